/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Taking back what a live connection's receive window offers.
 *
 * The kernel never moves the window's right edge to the left (RFC 9293, section 3.8.6.2.1: one
 * SHOULD NOT). A peer that waits for an answer has nothing under way, though, and any sender has to
 * cope with it, so that it can be done then: the window is written as a repaired connection's would
 * be. A peer heeds a smaller window in a segment that acknowledges something new (RFC 9293, section
 * 3.10.7.4): usually the answer, which acknowledges the last of what it answers.
 *
 *	          rcv_wup      rcv_nxt
 *	before    |------------|===============================| right edge
 *	after     |------------|====octets====|
 */
#include <errno.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <linux/sockios.h>
#include <linux/tcp.h>

#include "tcp_repair.h"

static enum prism_tcp_result get(int fd, int name, void *value, socklen_t size, const char *what,
				 struct prism_fault *fault)
{
	if (getsockopt(fd, IPPROTO_TCP, name, value, &size) == 0)
		return PRISM_TCP_OK;
	return prism_fail(fault, errno, what);
}

/* In repair mode. The bound first, or the kernel would offer more again with the next segment. */
static enum prism_tcp_result move_edge(int fd, uint32_t octets, struct prism_fault *fault)
{
	struct tcp_repair_window window;
	uint32_t rcv_nxt, wanted;

	PRISM_TRY(prism_set_int(fd, IPPROTO_TCP, TCP_WINDOW_CLAMP, (int)octets, "TCP_WINDOW_CLAMP",
				fault));
	PRISM_TRY(get(fd, TCP_REPAIR_WINDOW, &window, sizeof(window), "TCP_REPAIR_WINDOW", fault));
	PRISM_TRY(prism_set_int(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_RECV_QUEUE,
				"TCP_REPAIR_QUEUE", fault));
	PRISM_TRY(get(fd, TCP_QUEUE_SEQ, &rcv_nxt, sizeof(rcv_nxt), "TCP_QUEUE_SEQ", fault));
	PRISM_TRY(prism_set_int(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_NO_QUEUE, "TCP_REPAIR_QUEUE",
				fault));
	wanted = rcv_nxt + octets - window.rcv_wup;
	if (window.rcv_wnd <= wanted)
		return PRISM_TCP_OK;
	window.rcv_wnd = wanted;
	if (setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &window, sizeof(window)) != 0)
		return prism_fail(fault, errno, "TCP_REPAIR_WINDOW");
	return PRISM_TCP_OK;
}

enum prism_tcp_result prism_tcp_narrow(int fd, uint32_t octets, uint32_t *clamp,
				       struct prism_fault *fault)
{
	enum prism_tcp_result result;
	struct prism_fault ignored;
	int queued = 0;

	*clamp = 0;
	if (ioctl(fd, SIOCINQ, &queued) != 0)
		return prism_fail(fault, errno, "SIOCINQ");
	if (queued) /* it does not wait: more may be under way */
		return PRISM_TCP_OK;
	PRISM_TRY(get(fd, TCP_WINDOW_CLAMP, clamp, sizeof(*clamp), "TCP_WINDOW_CLAMP", fault));
	PRISM_TRY(prism_tcp_freeze(fd, fault));
	result = move_edge(fd, octets, fault);
	if (result != PRISM_TCP_OK) /* or it would stay narrow for good */
		(void)prism_set_int(fd, IPPROTO_TCP, TCP_WINDOW_CLAMP, (int)*clamp,
				    "TCP_WINDOW_CLAMP", &ignored);
	PRISM_TRY(prism_tcp_resume(fd, 0, result == PRISM_TCP_OK ? fault : &ignored));
	return result;
}
