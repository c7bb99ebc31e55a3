/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * What a program and the monitor module say to each other over /dev/prism_monitor.
 *
 * Register connected TCP sockets with PRISM_MONITOR_REGISTER; read(2) gives one struct
 * prism_monitor_event for each of them, once nothing of its connection is left in the kernel. As
 * many events as fit into the buffer are read at once; poll(2) tells when there are some.
 *
 * Both what is registered and what is unread are bounded for each descriptor. Beyond the first
 * bound, registering fails with ENOSPC. Beyond the second, events are lost, and the next read
 * begins with an event that says how many (PRISM_MONITOR_LOST); PRISM_MONITOR_CHECK tells which
 * sockets are still registered, so of those that are not and had no event the event was lost.
 */
#ifndef PRISM_MONITOR_H
#define PRISM_MONITOR_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define PRISM_MONITOR_ABI  2
#define PRISM_MONITOR_PATH "/dev/prism_monitor"

/**
 * enum prism_monitor_reason - why a connection is gone
 * @PRISM_MONITOR_CLOSED: both sides closed it, the peer first; or the socket had no peer any more
 *	when it was registered
 * @PRISM_MONITOR_RESET: reset by either side, or aborted
 * @PRISM_MONITOR_TIMED_OUT: given up while retransmitting or probing
 * @PRISM_MONITOR_TIME_WAIT: this side closed it first, and its TIME_WAIT (or FIN_WAIT2 without a
 *	socket) has come to its end, of itself or because the client uses its port again; but see
 *	PRISM_MONITOR_STARTS
 * @PRISM_MONITOR_HANDED_OFF: closed in repair mode, without a packet
 * @PRISM_MONITOR_LOST: not the end of a connection: as many events as the cookie says found the
 *	queue full since the last read, and will not come
 */
enum prism_monitor_reason {
	PRISM_MONITOR_CLOSED = 1,
	PRISM_MONITOR_RESET = 2,
	PRISM_MONITOR_TIMED_OUT = 3,
	PRISM_MONITOR_TIME_WAIT = 4,
	PRISM_MONITOR_HANDED_OFF = 5,
	PRISM_MONITOR_LOST = 6,
};

/*
 * In an event's flags: with PRISM_MONITOR_TIME_WAIT, its TIME_WAIT stands yet, and there will be no
 * word of its end: the reader has to wait it out. On kernels without PRISM_MONITOR_SEES_TIME_WAIT,
 * and of a connection that was in TIME_WAIT before it was registered.
 */
#define PRISM_MONITOR_STARTS 0x1

/* In the features of struct prism_monitor_info: the end of TIME_WAIT is observed. */
#define PRISM_MONITOR_SEES_TIME_WAIT 0x1

/**
 * struct prism_monitor_event - a connection is gone, or events were lost
 * @cookie: what the registration said; how many events were lost
 * @socket: the socket's own cookie (SO_COOKIE)
 * @when: CLOCK_MONOTONIC, in nanoseconds
 * @family: AF_INET or AF_INET6, that of the socket
 * @reason: enum prism_monitor_reason
 * @flags: PRISM_MONITOR_STARTS
 * @local_port: as it was at the registration, network byte order
 * @peer_port: likewise
 * @local: address; an IPv4 one in the first four octets
 * @peer: likewise
 */
struct prism_monitor_event {
	__u64 cookie;
	__u64 socket;
	__u64 when;
	__u16 family;
	__u8 reason;
	__u8 flags;
	__be16 local_port;
	__be16 peer_port;
	__u8 local[16];
	__u8 peer[16];
};

/**
 * struct prism_monitor_register - PRISM_MONITOR_REGISTER
 * @fd: in: a TCP socket that is, or was, connected
 * @flags: in: zero
 * @cookie: in: comes back in the event
 * @socket: out: the socket's own cookie (SO_COOKIE)
 *
 * Errors: EBADF, ENOTSOCK, EPROTONOSUPPORT (not TCP), ENOTCONN (listening, connecting or never
 * connected), EEXIST (registered here already), EBUSY (registered at another descriptor),
 * ENOSPC (too many), ENOMEM, EINVAL (flags).
 */
struct prism_monitor_register {
	__s32 fd;
	__u32 flags;
	__u64 cookie;
	__u64 socket;
};

/**
 * struct prism_monitor_info - PRISM_MONITOR_INFO
 * @abi: PRISM_MONITOR_ABI
 * @features: PRISM_MONITOR_SEES_TIME_WAIT
 * @limit: how many may be registered at one descriptor
 * @registered: how many are registered at this descriptor
 * @unread: how many events wait to be read
 * @lost: how many were lost since the last read
 */
struct prism_monitor_info {
	__u32 abi;
	__u32 features;
	__u32 limit;
	__u32 registered;
	__u32 unread;
	__u32 lost;
};

#define PRISM_MONITOR_REGISTER _IOWR('P', 0xa0, struct prism_monitor_register)
/* Argument: the socket's own cookie. ENOENT: not registered here, or its event is there already. */
#define PRISM_MONITOR_UNREGISTER _IOW('P', 0xa1, __u64)
#define PRISM_MONITOR_INFO	 _IOR('P', 0xa2, struct prism_monitor_info)
/* Argument: the socket's own cookie. Succeeds while it is registered here; else ENOENT. */
#define PRISM_MONITOR_CHECK _IOW('P', 0xa3, __u64)

#endif
