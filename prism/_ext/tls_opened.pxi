# What Tls.peek() gives; part of tls_record.pyx.


cdef class Opened:
    cdef prism_tls_mark *_marks
    cdef prism_tls_opened _result
    cdef prism_tls_progress _start
    cdef prism_tls_progress _end
    cdef readonly bytes data
    cdef readonly object error

    def __init__(self):
        raise TypeError("use Tls.peek() or Tls.open()")

    def __dealloc__(self):
        free(self._marks)

    def __repr__(self):
        return (
            f"<Opened {self._result.records} records: {self._result.consumed} octets, "
            f"{self._result.plain} of data{', closed' if self._end.closed else ''}"
            f"{', failed' if self.error is not None else ''}>"
        )

    @property
    def records(self):
        return self._result.records

    @property
    def consumed(self):
        return self._result.consumed

    @property
    def wanted(self):
        return self._result.wanted

    @property
    def closed(self):
        return bool(self._end.closed)

    @property
    def alert(self):
        return self._end.alert if self._end.closed else None

    @property
    def ends(self):
        cdef size_t i
        return [
            (self._marks[i].type, self._marks[i].plain_end, self._marks[i].cipher_end)
            for i in range(self._result.records)
        ]

    def cut(self, Py_ssize_t octets):
        """The first mark with enough plaintext, by bisection."""
        cdef size_t low = 0
        cdef size_t high = self._result.records
        cdef size_t middle
        if octets < 0 or <size_t>octets > self._result.plain:
            raise ValueError(f"{octets} is more than the {self._result.plain} octets opened")
        if octets == 0:
            return 0, 0, 0
        while low < high:
            middle = (low + high) // 2
            if self._marks[middle].plain_end < <size_t>octets:
                low = middle + 1
            else:
                high = middle
        return low + 1, self._marks[low].cipher_end, self._marks[low].plain_end
