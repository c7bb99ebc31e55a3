// SPDX-License-Identifier: GPL-2.0
/*
 * Tells programs when nothing of a TCP connection is left in the kernel, TIME_WAIT included.
 *
 * A connection is, one after the other, a socket and perhaps a TIME_WAIT socket. The module hooks
 * the end of both, for registered sockets only; no other socket is touched or slowed down:
 *
 *   sk->sk_destruct        called when the last reference to the socket is gone: not even a packet
 *                          in a device's queue belongs to it any more.
 *   sk->sk_prot_creator    the protocol that allocated the socket, and the one that TIME_WAIT
 *                          sockets are made from. Ours is a copy of it which differs in the owner
 *                          (this module) and in the destructor of TIME_WAIT sockets.
 *
 * The kernel counts the owner's uses itself, for sockets and TIME_WAIT sockets alike, so this
 * module cannot be unloaded while any of them could still call it.
 *
 * A socket and its TIME_WAIT have the same cookie (SO_COOKIE), which nothing else of this boot has;
 * by it both hooks find the registration in a table. Whether there is a TIME_WAIT at all is looked
 * up in the kernel's own table of connections when the socket is destroyed.
 *
 *   registered --- the socket is destroyed ---+--- no TIME_WAIT stands, or it ended ----> event
 *                                             |
 *                                             +--- waiting --- TIME_WAIT destroyed -----> event
 *
 * A registration becomes the event: it moves from the table to its descriptor's queue. So an event
 * needs no memory that could be missing. The queue is bounded: what comes while it is full is
 * counted, and the reader is told how many were lost before anything else.
 *
 * Locks, outer first: the socket's, pm_protos_lock; a bucket's, then a descriptor's. Hooks run in
 * any context, so the last two are taken with interrupts off.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/fs.h>
#include <linux/hash.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/net.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/sock_diag.h>
#include <linux/spinlock.h>
#include <linux/tcp.h>
#include <linux/timekeeping.h>
#include <linux/uaccess.h>
#include <linux/wait.h>
#include <net/inet6_hashtables.h>
#include <net/inet_common.h>
#include <net/inet_hashtables.h>
#include <net/inet_timewait_sock.h>
#include <net/ipv6.h>
#include <net/sock.h>
#include <net/tcp.h>
#include <net/timewait_sock.h>

#include "prism_monitor.h"

#define PM_BUCKETS_ORDER 16
#define PM_PROTOS	 4 /* IPv4 and IPv6, and as many again for whoever replaces them */

#ifdef PRISM_SEES_TIME_WAIT
#define PM_FEATURES PRISM_MONITOR_SEES_TIME_WAIT
#else
#define PM_FEATURES 0
#endif

/* The kernel's table of connections became implicit when there was but one left. */
#ifdef PRISM_LOOKUP_WANTS_TABLE
#define PM_TABLE(net) (net)->ipv4.tcp_death_row.hashinfo,
#else
#define PM_TABLE(net)
#endif

typedef void (*pm_destruct_t)(struct sock *sk); /* of sk_destruct */

static unsigned int max_registrations = 1 << 20;
module_param(max_registrations, uint, 0644);
MODULE_PARM_DESC(max_registrations, "sockets registered at one descriptor");

static unsigned int max_unread = 1 << 18;
module_param(max_unread, uint, 0644);
MODULE_PARM_DESC(max_unread,
		 "events unread at one descriptor; beyond that they are lost, and counted");

/**
 * struct pm_file - an open descriptor of the device
 * @lock: protects all below
 * @ready: events to be read, the first first
 * @registered: registrations in the table
 * @unread: events in @ready, and those that are being read
 * @lost: events that found @ready full, and that no reader has been told of yet
 * @wait: readers
 * @rcu: hooks wake the readers after letting go of the locks
 */
struct pm_file {
	spinlock_t lock;
	struct list_head ready;
	u32 registered;
	u32 unread;
	u64 lost;
	wait_queue_head_t wait;
	struct rcu_head rcu;
};

/**
 * struct pm_conn - a registered connection, later its event
 * @node: in a bucket, until the event
 * @ready: in the descriptor's queue, from the event on
 * @file: the descriptor; NULL: nobody wants to know, but the socket's hooks are still ours
 * @destruct: the socket's own sk_destruct
 * @time_wait_ended: its TIME_WAIT ended before the socket itself did
 * @waiting: the socket has gone, its TIME_WAIT stands
 * @late: the connection had ended when it was registered, perhaps by a TIME_WAIT
 * @event: what will be read
 */
struct pm_conn {
	struct hlist_node node;
	struct list_head ready;
	struct pm_file *file;
	pm_destruct_t destruct;
	bool time_wait_ended;
	bool waiting;
	bool late;
	struct prism_monitor_event event;
};

/**
 * struct pm_bucket - a chain of the table of registrations
 * @lock: protects the chain, and file, time_wait_ended and waiting of what is in it
 * @head: the chain
 */
struct pm_bucket {
	spinlock_t lock;
	struct hlist_head head;
};

/**
 * struct pm_proto - a copy of a protocol, for sk_prot_creator
 * @prot: the copy, owned by this module
 * @twsk: a copy of its operations on TIME_WAIT sockets
 * @orig: what was copied
 * @destruct: the sk_destruct of its sockets
 */
struct pm_proto {
	struct proto prot;
	struct timewait_sock_ops twsk;
	struct proto *orig;
	pm_destruct_t destruct;
};

/**
 * enum pm_time_wait - whether the TIME_WAIT of a destroyed socket stands
 * @PM_NONE: it does not
 * @PM_OBSERVED: it does, and we shall be called at its end
 * @PM_UNOBSERVED: it does, but it was there before the socket was registered, or the kernel calls
 *	nobody
 * @PM_NAMELESS: one does, which began when its socket had no cookie yet
 */
enum pm_time_wait { PM_NONE, PM_OBSERVED, PM_UNOBSERVED, PM_NAMELESS };

static struct pm_bucket *pm_table;
static struct kmem_cache *pm_conns;
static struct pm_proto *pm_protos[PM_PROTOS]; /* filled one after the other, never emptied */
static DEFINE_MUTEX(pm_protos_lock);
static atomic_t pm_pinned;

/**
 * pm_bucket() - the bucket of a socket
 * @socket: its cookie
 *
 * Return: the bucket.
 */
static struct pm_bucket *pm_bucket(u64 socket)
{
	return &pm_table[hash_64(socket, PM_BUCKETS_ORDER)];
}

/**
 * pm_find() - the registration of a socket
 * @bucket: its bucket, locked
 * @socket: its cookie
 *
 * Return: the registration, NULL if there is none.
 */
static struct pm_conn *pm_find(struct pm_bucket *bucket, u64 socket)
{
	struct pm_conn *conn;

	hlist_for_each_entry(conn, &bucket->head,
			     node) if (conn->event.socket == socket) return conn;
	return NULL;
}

/**
 * pm_readable() - whether a descriptor has anything to be read
 * @file: the descriptor; locked, or the answer is a hint
 *
 * Return: whether events wait, or some were lost.
 */
static bool pm_readable(struct pm_file *file)
{
	return !list_empty_careful(&file->ready) || READ_ONCE(file->lost);
}

/**
 * pm_tell() - turn a registration into its event
 * @conn: in a locked bucket, with a descriptor; gone afterwards
 * @reason: enum prism_monitor_reason
 * @flags: of the event
 *
 * Return: the descriptor whose readers the caller has to wake inside the same RCU read-side
 * section, NULL if there was something to be read already.
 */
static struct pm_file *pm_tell(struct pm_conn *conn, u8 reason, u8 flags)
{
	struct pm_file *file = conn->file;
	bool first;

	hlist_del(&conn->node);
	conn->event.reason = reason;
	conn->event.flags = flags;
	conn->event.when = ktime_get_ns();
	spin_lock(&file->lock);
	first = !pm_readable(file);
	file->registered--;
	if (likely(file->unread < READ_ONCE(max_unread))) {
		list_add_tail(&conn->ready, &file->ready);
		file->unread++;
		conn = NULL;
	} else {
		WRITE_ONCE(file->lost, file->lost + 1);
	}
	spin_unlock(&file->lock);
	if (unlikely(conn))
		kmem_cache_free(pm_conns, conn);
	return first ? file : NULL;
}

/**
 * pm_wake() - wake a descriptor's readers
 * @file: the descriptor, or NULL
 */
static void pm_wake(struct pm_file *file)
{
	if (file)
		wake_up_interruptible_poll(&file->wait, EPOLLIN | EPOLLRDNORM);
}

/**
 * pm_lookup() - what the kernel has for a socket's addresses
 * @sk: a socket that is being destroyed; in no table any more
 *
 * Return: the socket or TIME_WAIT socket, with a reference; NULL if there is none.
 */
static struct sock *pm_lookup(struct sock *sk)
{
	const struct inet_sock *inet = inet_sk(sk);
	struct net *net = sock_net(sk);

#if IS_ENABLED(CONFIG_IPV6)
	if (sk->sk_family == AF_INET6 && !ipv6_addr_v4mapped(&sk->sk_v6_daddr))
		return __inet6_lookup_established(net, PM_TABLE(net) & sk->sk_v6_daddr,
						  inet->inet_dport, &sk->sk_v6_rcv_saddr,
						  ntohs(inet->inet_sport), sk->sk_bound_dev_if, 0);
#endif
	return __inet_lookup_established(net, PM_TABLE(net) inet->inet_daddr, inet->inet_dport,
					 inet->inet_rcv_saddr, ntohs(inet->inet_sport),
					 sk->sk_bound_dev_if, 0);
}

/**
 * pm_is_ours() - whether a protocol is one of our copies
 * @prot: the protocol
 *
 * Return: whether it is.
 */
static bool pm_is_ours(const struct proto *prot)
{
	return prot->owner == THIS_MODULE;
}

/**
 * pm_time_wait() - whether the TIME_WAIT of a socket stands
 * @sk: a socket that is being destroyed
 * @socket: its cookie
 *
 * Return: whether it does, and whether we shall be called at its end. If none stands, there has
 * been none or it has ended.
 */
static enum pm_time_wait pm_time_wait(struct sock *sk, u64 socket)
{
	enum pm_time_wait stands = PM_NONE;
	struct sock *found;

	if (!inet_sk(sk)->inet_dport)
		return PM_NONE; /* disconnected: no TIME_WAIT follows that */
	found = pm_lookup(sk);
	if (!found)
		return PM_NONE;
	if (found->sk_state == TCP_TIME_WAIT) {
		u64 cookie = atomic64_read(&inet_twsk(found)->tw_cookie);

		if (cookie == socket && (PM_FEATURES & PRISM_MONITOR_SEES_TIME_WAIT) &&
		    pm_is_ours(inet_twsk(found)->tw_prot))
			stands = PM_OBSERVED;
		else if (cookie == socket)
			stands = PM_UNOBSERVED;
		else if (!cookie)
			stands = PM_NAMELESS;
	}
	sock_gen_put(found); /* may be the last reference, and call pm_twsk_destructor() */
	return stands;
}

/**
 * pm_reason() - why a connection without TIME_WAIT has ended
 * @sk: its socket, being destroyed
 *
 * sk_err is lost when the program has read it, so what else the socket knows is asked, too: what
 * it retransmitted in vain, whether the peer's FIN came (SOCK_DONE), and whether octets were unread
 * when it was closed (RFC 2525, 2.17: then a reset is sent).
 *
 * Return: enum prism_monitor_reason.
 */
static u8 pm_reason(struct sock *sk)
{
	const struct inet_connection_sock *icsk = inet_csk(sk);
	const struct tcp_sock *tp = tcp_sk(sk);
	int error = READ_ONCE(sk->sk_err);

	if (tp->repair)
		return PRISM_MONITOR_HANDED_OFF;
	if (error == ECONNRESET || error == EPIPE || error == ECONNABORTED)
		return PRISM_MONITOR_RESET;
	if (error || icsk->icsk_retransmits || icsk->icsk_probes_out)
		return PRISM_MONITOR_TIMED_OUT;
	/* The FIN has a sequence number, which the reader of the last octet need not have taken. */
	if (!sock_flag(sk, SOCK_DONE) || before(tp->copied_seq + 1, tp->rcv_nxt))
		return PRISM_MONITOR_RESET;
	return PRISM_MONITOR_CLOSED;
}

/**
 * pm_destruct_of() - the sk_destruct of a socket that inherited ours
 * @sk: a socket without registration: accepted from a registered one that became a listener
 *
 * Return: the protocol's own sk_destruct.
 */
static pm_destruct_t pm_destruct_of(const struct sock *sk)
{
	int i;

	for (i = 0; i < PM_PROTOS; i++) {
		struct pm_proto *proto = smp_load_acquire(&pm_protos[i]);

		if (proto &&
		    (sk->sk_prot_creator == proto->orig || sk->sk_prot_creator == &proto->prot))
			return proto->destruct;
	}
	return inet_sock_destruct;
}

/**
 * pm_sk_destruct() - nothing of a registered socket is left
 * @sk: the socket
 *
 * Stands in for its sk_destruct, and calls that at the end.
 */
static void pm_sk_destruct(struct sock *sk)
{
	u64 socket = atomic64_read(&sk->sk_cookie);
	struct pm_bucket *bucket = pm_bucket(socket);
	void (*destruct)(struct sock * sk) = NULL;
	struct pm_file *wake = NULL;
	struct pm_conn *conn;
	enum pm_time_wait stands;
	unsigned long flags;

	/*
	 * A program may have made a listener of the socket. What that accepted has our hook by
	 * inheritance, but no reference to this module: it must not be unloaded any more.
	 */
	if (unlikely(sock_flag(sk, SOCK_RCU_FREE)) && !atomic_xchg(&pm_pinned, 1)) {
		__module_get(THIS_MODULE);
		pr_warn("a registered socket was listening: the module stays until the next "
			"boot\n");
	}
	rcu_read_lock();
	/* Before the lock: a TIME_WAIT that ends in between sets time_wait_ended. */
	stands = pm_time_wait(sk, socket);
	spin_lock_irqsave(&bucket->lock, flags);
	conn = pm_find(bucket, socket);
	if (likely(conn)) {
		destruct = conn->destruct;
		if (!conn->file) {
			hlist_del(&conn->node);
			kmem_cache_free(pm_conns, conn);
		} else if (conn->time_wait_ended) {
			wake = pm_tell(conn, PRISM_MONITOR_TIME_WAIT, 0);
		} else if (stands == PM_NONE || (stands == PM_NAMELESS && !conn->late)) {
			wake = pm_tell(conn, pm_reason(sk), 0);
		} else if (stands == PM_OBSERVED) {
			conn->waiting = true;
		} else {
			wake = pm_tell(conn, PRISM_MONITOR_TIME_WAIT, PRISM_MONITOR_STARTS);
		}
	}
	spin_unlock_irqrestore(&bucket->lock, flags);
	pm_wake(wake);
	rcu_read_unlock();
	if (unlikely(!destruct))
		destruct = pm_destruct_of(sk);
	destruct(sk);
}

#ifdef PRISM_SEES_TIME_WAIT
/**
 * pm_twsk_destructor() - nothing of a registered socket's TIME_WAIT is left
 * @sk: the TIME_WAIT socket
 *
 * Stands in for its protocol's destructor, and calls that at the end.
 */
static void pm_twsk_destructor(struct sock *sk)
{
	struct pm_proto *proto = container_of(inet_twsk(sk)->tw_prot, struct pm_proto, prot);
	u64 socket = atomic64_read(&inet_twsk(sk)->tw_cookie);
	struct pm_bucket *bucket = pm_bucket(socket);
	struct pm_file *wake = NULL;
	struct pm_conn *conn;
	unsigned long flags;

	rcu_read_lock();
	spin_lock_irqsave(&bucket->lock, flags);
	conn = pm_find(bucket, socket);
	if (conn && conn->waiting)
		wake = pm_tell(conn, PRISM_MONITOR_TIME_WAIT, 0);
	else if (conn)
		conn->time_wait_ended = true;
	spin_unlock_irqrestore(&bucket->lock, flags);
	pm_wake(wake);
	rcu_read_unlock();
	if (proto->orig->twsk_prot->twsk_destructor)
		proto->orig->twsk_prot->twsk_destructor(sk);
}
#endif

/**
 * pm_copy_proto() - our copy of a socket's protocol, made when it is first met
 * @sk: the socket; its sk_prot_creator is not ours
 *
 * Return: the copy, or an error pointer: -ENOMEM, -EPROTONOSUPPORT (too many protocols).
 */
static struct pm_proto *pm_copy_proto(struct sock *sk)
{
	struct proto *orig = sk->sk_prot_creator;
	struct pm_proto *proto;
	int i;

	for (i = 0; i < PM_PROTOS && pm_protos[i]; i++)
		if (pm_protos[i]->orig == orig)
			return pm_protos[i];
	if (i == PM_PROTOS || !orig->twsk_prot)
		return ERR_PTR(-EPROTONOSUPPORT);
	proto = kzalloc(sizeof(*proto), GFP_KERNEL);
	if (!proto)
		return ERR_PTR(-ENOMEM);
	__module_get(orig->owner);
	proto->orig = orig;
	proto->destruct = sk->sk_destruct == pm_sk_destruct ? inet_sock_destruct : sk->sk_destruct;
	proto->prot = *orig;
	proto->prot.owner = THIS_MODULE;
#ifdef PRISM_SEES_TIME_WAIT
	proto->twsk = *orig->twsk_prot;
	proto->twsk.twsk_destructor = pm_twsk_destructor;
	proto->prot.twsk_prot = &proto->twsk;
#endif
	smp_store_release(&pm_protos[i], proto);
	return proto;
}

/**
 * pm_hook() - have this module called at the end of a socket and of its TIME_WAIT
 * @sk: the socket, locked: so it does not enter TIME_WAIT meanwhile
 * @conn: its registration; takes the socket's own sk_destruct
 *
 * Return: 0, -ENOMEM or -EPROTONOSUPPORT; on errors nothing has changed.
 */
static int pm_hook(struct sock *sk, struct pm_conn *conn)
{
	struct pm_proto *proto;

	if (!pm_is_ours(sk->sk_prot_creator)) {
		mutex_lock(&pm_protos_lock);
		proto = pm_copy_proto(sk);
		mutex_unlock(&pm_protos_lock);
		if (IS_ERR(proto))
			return PTR_ERR(proto);
		/* The socket's reference moves from the owner of the protocol to this module. */
		__module_get(THIS_MODULE);
		module_put(proto->orig->owner);
		WRITE_ONCE(sk->sk_prot_creator, &proto->prot);
	}
	if (sk->sk_destruct == pm_sk_destruct) {
		conn->destruct = pm_destruct_of(sk); /* inherited */
	} else {
		conn->destruct = sk->sk_destruct;
		sk->sk_destruct = pm_sk_destruct;
	}
	return 0;
}

/**
 * pm_describe() - note a socket's addresses for the event
 * @sk: the socket, locked
 * @event: the event
 */
static void pm_describe(const struct sock *sk, struct prism_monitor_event *event)
{
	const struct inet_sock *inet = inet_sk(sk);

	event->family = sk->sk_family;
	event->local_port = inet->inet_sport;
	event->peer_port = inet->inet_dport;
#if IS_ENABLED(CONFIG_IPV6)
	if (sk->sk_family == AF_INET6) {
		memcpy(event->local, &sk->sk_v6_rcv_saddr, 16);
		memcpy(event->peer, &sk->sk_v6_daddr, 16);
		return;
	}
#endif
	memcpy(event->local, &inet->inet_rcv_saddr, 4);
	memcpy(event->peer, &inet->inet_daddr, 4);
}

/**
 * pm_registrable() - whether a socket's end can be told
 * @sk: a TCP socket, locked
 *
 * Return: whether it has or had a peer. One that lost it before it was registered counts: its
 * event comes when it is closed.
 */
static bool pm_registrable(const struct sock *sk)
{
	switch (sk->sk_state) {
	case TCP_LISTEN:
	case TCP_SYN_SENT:
		return false;
	case TCP_CLOSE:
		return inet_sk(sk)->inet_dport != 0;
	default:
		return true;
	}
}

/**
 * pm_enter() - enter a registration in the table
 * @file: the descriptor; its counter includes this one already
 * @sk: the socket, locked
 * @fresh: a new registration, with cookie and addresses; consumed (set to NULL) if it was needed
 *
 * Return: 0, -EEXIST, -EBUSY, or an error of pm_hook().
 */
static int pm_enter(struct pm_file *file, struct sock *sk, struct pm_conn **fresh)
{
	struct pm_bucket *bucket = pm_bucket((*fresh)->event.socket);
	struct pm_conn *conn;
	int error = 0;

	spin_lock_irq(&bucket->lock);
	conn = pm_find(bucket, (*fresh)->event.socket);
	if (conn && conn->file) {
		error = conn->file == file ? -EEXIST : -EBUSY;
	} else if (conn) { /* unregistered before: the hooks are there */
		conn->file = file;
		conn->event = (*fresh)->event; /* late is as it was at the first time */
	}
	spin_unlock_irq(&bucket->lock);
	if (error || conn)
		return error;
	/* The caller holds the socket's lock and a reference: nobody enters or ends it meanwhile.
	 */
	error = pm_hook(sk, *fresh);
	if (error)
		return error;
	spin_lock_irq(&bucket->lock);
	hlist_add_head(&(*fresh)->node, &bucket->head);
	spin_unlock_irq(&bucket->lock);
	*fresh = NULL;
	return 0;
}

/**
 * pm_register_sock() - register a TCP socket
 * @file: the descriptor
 * @sk: the socket, not locked
 * @request: cookie; the socket's own is entered
 *
 * Return: 0, or an error that the header describes.
 */
static int pm_register_sock(struct pm_file *file, struct sock *sk,
			    struct prism_monitor_register *request)
{
	struct pm_conn *fresh;
	u32 cookie[2];
	int error = -ENOTCONN;

	fresh = kmem_cache_zalloc(pm_conns, GFP_KERNEL_ACCOUNT);
	if (!fresh)
		return -ENOMEM;
	fresh->file = file;
	lock_sock(sk);
	if (pm_registrable(sk)) {
		sock_diag_save_cookie(sk, cookie);
		request->socket = (u64)cookie[1] << 32 | cookie[0];
		fresh->late = sk->sk_state == TCP_CLOSE;
		fresh->event.cookie = request->cookie;
		fresh->event.socket = request->socket;
		pm_describe(sk, &fresh->event);
		error = pm_enter(file, sk, &fresh);
	}
	release_sock(sk);
	if (fresh)
		kmem_cache_free(pm_conns, fresh);
	return error;
}

/**
 * pm_count() - make room for a registration
 * @file: the descriptor
 *
 * Return: 0, -ENOSPC if too many are registered.
 */
static int pm_count(struct pm_file *file)
{
	int error = 0;

	spin_lock_irq(&file->lock);
	if (file->registered >= READ_ONCE(max_registrations))
		error = -ENOSPC;
	else
		file->registered++;
	spin_unlock_irq(&file->lock);
	return error;
}

/**
 * pm_uncount() - take a registration off the count
 * @file: the descriptor
 */
static void pm_uncount(struct pm_file *file)
{
	unsigned long flags;

	spin_lock_irqsave(&file->lock, flags);
	file->registered--;
	spin_unlock_irqrestore(&file->lock, flags);
}

/**
 * pm_register() - PRISM_MONITOR_REGISTER
 * @file: the descriptor
 * @argument: struct prism_monitor_register
 *
 * Return: 0, or an error that the header describes.
 */
static int pm_register(struct pm_file *file, void __user *argument)
{
	struct prism_monitor_register request;
	struct socket *sock;
	struct sock *sk;
	int error;

	if (copy_from_user(&request, argument, sizeof(request)))
		return -EFAULT;
	if (request.flags)
		return -EINVAL;
	sock = sockfd_lookup(request.fd, &error);
	if (!sock)
		return error;
	sk = sock->sk;
	error = -EPROTONOSUPPORT;
	if ((sk->sk_family == AF_INET || sk->sk_family == AF_INET6) && sk->sk_type == SOCK_STREAM &&
	    sk->sk_protocol == IPPROTO_TCP) {
		error = pm_count(file);
		if (!error) {
			error = pm_register_sock(file, sk, &request);
			if (error)
				pm_uncount(file);
		}
	}
	sockfd_put(sock);
	if (!error && copy_to_user(argument, &request, sizeof(request)))
		error = -EFAULT;
	return error;
}

/**
 * pm_abandon() - nobody wants to know of a connection any more
 * @conn: in a locked bucket, with a descriptor
 *
 * The hooks stay as long as the socket, and so does the registration, without a descriptor.
 */
static void pm_abandon(struct pm_conn *conn)
{
	pm_uncount(conn->file);
	conn->file = NULL;
	if (conn->waiting) {
		hlist_del(&conn->node);
		kmem_cache_free(pm_conns, conn);
	}
}

/**
 * pm_unregister() - PRISM_MONITOR_UNREGISTER
 * @file: the descriptor
 * @argument: the socket's own cookie, __u64
 *
 * Return: 0, -EFAULT, -ENOENT.
 */
static int pm_unregister(struct pm_file *file, void __user *argument)
{
	struct pm_bucket *bucket;
	struct pm_conn *conn;
	int error = -ENOENT;
	u64 socket;

	if (copy_from_user(&socket, argument, sizeof(socket)))
		return -EFAULT;
	bucket = pm_bucket(socket);
	spin_lock_irq(&bucket->lock);
	conn = pm_find(bucket, socket);
	if (conn && conn->file == file) {
		pm_abandon(conn);
		error = 0;
	}
	spin_unlock_irq(&bucket->lock);
	return error;
}

/**
 * pm_check() - PRISM_MONITOR_CHECK
 * @file: the descriptor
 * @argument: the socket's own cookie, __u64
 *
 * Return: 0, -EFAULT, -ENOENT.
 */
static int pm_check(struct pm_file *file, void __user *argument)
{
	struct pm_bucket *bucket;
	struct pm_conn *conn;
	bool found;
	u64 socket;

	if (copy_from_user(&socket, argument, sizeof(socket)))
		return -EFAULT;
	bucket = pm_bucket(socket);
	spin_lock_irq(&bucket->lock);
	conn = pm_find(bucket, socket);
	found = conn && conn->file == file;
	spin_unlock_irq(&bucket->lock);
	return found ? 0 : -ENOENT;
}

/**
 * pm_info() - PRISM_MONITOR_INFO
 * @file: the descriptor
 * @argument: struct prism_monitor_info
 *
 * Return: 0 or -EFAULT.
 */
static int pm_info(struct pm_file *file, void __user *argument)
{
	struct prism_monitor_info info = {
		.abi = PRISM_MONITOR_ABI,
		.features = PM_FEATURES,
		.limit = READ_ONCE(max_registrations),
	};

	spin_lock_irq(&file->lock);
	info.registered = file->registered;
	info.unread = file->unread;
	info.lost = min_t(u64, file->lost, U32_MAX);
	spin_unlock_irq(&file->lock);
	return copy_to_user(argument, &info, sizeof(info)) ? -EFAULT : 0;
}

/**
 * pm_ioctl() - the device's ioctl(2)
 * @filp: the open device
 * @command: which
 * @argument: its argument
 *
 * Return: 0, an error of the command, -ENOTTY for an unknown one.
 */
static long pm_ioctl(struct file *filp, unsigned int command, unsigned long argument)
{
	struct pm_file *file = filp->private_data;
	void __user *user = (void __user *)argument;

	switch (command) {
	case PRISM_MONITOR_REGISTER:
		return pm_register(file, user);
	case PRISM_MONITOR_UNREGISTER:
		return pm_unregister(file, user);
	case PRISM_MONITOR_CHECK:
		return pm_check(file, user);
	case PRISM_MONITOR_INFO:
		return pm_info(file, user);
	default:
		return -ENOTTY;
	}
}

/**
 * pm_take() - take the first event
 * @file: the descriptor
 *
 * Return: the event, NULL if there is none. It still counts as unread.
 */
static struct pm_conn *pm_take(struct pm_file *file)
{
	struct pm_conn *conn;

	spin_lock_irq(&file->lock);
	conn = list_first_entry_or_null(&file->ready, struct pm_conn, ready);
	if (conn)
		list_del(&conn->ready);
	spin_unlock_irq(&file->lock);
	return conn;
}

/**
 * pm_done() - an event was taken: forget it, or put it back
 * @file: the descriptor
 * @conn: the event
 * @read: whether the reader has got it
 */
static void pm_done(struct pm_file *file, struct pm_conn *conn, bool read)
{
	spin_lock_irq(&file->lock);
	if (read)
		file->unread--;
	else
		list_add(&conn->ready, &file->ready);
	spin_unlock_irq(&file->lock);
	if (read)
		kmem_cache_free(pm_conns, conn);
	else
		pm_wake(file); /* another reader may have found nothing meanwhile */
}

/**
 * pm_read_lost() - tell a reader how many events were lost
 * @file: the descriptor
 * @buffer: room for one event
 *
 * Return: octets read: one event, or none if none were lost; -EFAULT.
 */
static ssize_t pm_read_lost(struct pm_file *file, char __user *buffer)
{
	struct prism_monitor_event event = {.reason = PRISM_MONITOR_LOST, .when = ktime_get_ns()};

	spin_lock_irq(&file->lock);
	event.cookie = file->lost;
	WRITE_ONCE(file->lost, 0);
	spin_unlock_irq(&file->lock);
	if (likely(!event.cookie))
		return 0;
	if (!copy_to_user(buffer, &event, sizeof(event)))
		return sizeof(event);
	spin_lock_irq(&file->lock);
	WRITE_ONCE(file->lost, file->lost + event.cookie);
	spin_unlock_irq(&file->lock);
	pm_wake(file); /* another reader may have found nothing meanwhile */
	return -EFAULT;
}

/**
 * pm_read() - the device's read(2)
 * @filp: the open device
 * @buffer: room for events
 * @size: its size in octets; what is beyond the last whole event is left alone
 * @offset: not used
 *
 * Return: octets read, at least one event; -EINVAL if there is no room for one, -EAGAIN,
 * -ERESTARTSYS, -EFAULT.
 */
static ssize_t pm_read(struct file *filp, char __user *buffer, size_t size, loff_t *offset)
{
	struct pm_file *file = filp->private_data;
	struct pm_conn *conn;
	ssize_t done;
	int error;

	if (size < sizeof(conn->event))
		return -EINVAL;
	for (;;) {
		done = pm_read_lost(file, buffer);
		if (done < 0)
			return done;
		while (size - done >= sizeof(conn->event) && (conn = pm_take(file))) {
			bool read = !copy_to_user(buffer + done, &conn->event, sizeof(conn->event));

			pm_done(file, conn, read);
			if (!read)
				return done ? done : -EFAULT;
			done += sizeof(conn->event);
			cond_resched();
		}
		if (done)
			return done;
		if (filp->f_flags & O_NONBLOCK)
			return -EAGAIN;
		error = wait_event_interruptible(file->wait, pm_readable(file));
		if (error)
			return error;
	}
}

/**
 * pm_poll() - the device's poll(2)
 * @filp: the open device
 * @wait: where to wait
 *
 * Return: EPOLLIN if there are events.
 */
static __poll_t pm_poll(struct file *filp, poll_table *wait)
{
	struct pm_file *file = filp->private_data;

	poll_wait(filp, &file->wait, wait);
	return pm_readable(file) ? EPOLLIN | EPOLLRDNORM : 0;
}

/**
 * pm_open() - the device's open(2)
 * @inode: the device
 * @filp: the open device
 *
 * Return: 0, -ENOMEM.
 */
static int pm_open(struct inode *inode, struct file *filp)
{
	struct pm_file *file = kzalloc(sizeof(*file), GFP_KERNEL_ACCOUNT);

	if (!file)
		return -ENOMEM;
	spin_lock_init(&file->lock);
	INIT_LIST_HEAD(&file->ready);
	init_waitqueue_head(&file->wait);
	filp->private_data = file;
	return stream_open(inode, filp);
}

/**
 * pm_abandon_all() - unregister all that a descriptor registered
 * @file: the descriptor; nobody else uses it any more, but hooks do
 */
static void pm_abandon_all(struct pm_file *file)
{
	struct hlist_node *next;
	struct pm_conn *conn;
	size_t i;

	for (i = 0; i < 1 << PM_BUCKETS_ORDER; i++) {
		spin_lock_irq(&pm_table[i].lock);
		hlist_for_each_entry_safe(conn, next, &pm_table[i].head,
					  node) if (conn->file == file) pm_abandon(conn);
		spin_unlock_irq(&pm_table[i].lock);
		cond_resched();
	}
}

/**
 * pm_release() - the last close(2) of a descriptor of the device
 * @inode: the device
 * @filp: the open device
 *
 * Return: 0.
 */
static int pm_release(struct inode *inode, struct file *filp)
{
	struct pm_file *file = filp->private_data;
	struct pm_conn *conn;
	u32 registered;

	spin_lock_irq(&file->lock);
	registered = file->registered;
	spin_unlock_irq(&file->lock);
	if (registered)
		pm_abandon_all(file);
	while ((conn = pm_take(file)))
		pm_done(file, conn, true);
	kfree_rcu(file, rcu);
	return 0;
}

static const struct file_operations pm_operations = {
	.owner = THIS_MODULE,
	.open = pm_open,
	.release = pm_release,
	.read = pm_read,
	.poll = pm_poll,
	.unlocked_ioctl = pm_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static struct miscdevice pm_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "prism_monitor",
	.fops = &pm_operations,
	.mode = 0600,
};

/**
 * pm_init() - the module is loaded
 *
 * Return: 0, -ENOMEM, or an error of misc_register().
 */
static int __init pm_init(void)
{
	size_t i;
	int error;

	BUILD_BUG_ON(sizeof(struct prism_monitor_event) != 64);
	pm_table = kvcalloc(1 << PM_BUCKETS_ORDER, sizeof(*pm_table), GFP_KERNEL);
	if (!pm_table)
		return -ENOMEM;
	for (i = 0; i < 1 << PM_BUCKETS_ORDER; i++)
		spin_lock_init(&pm_table[i].lock);
	pm_conns = KMEM_CACHE(pm_conn, 0);
	error = pm_conns ? misc_register(&pm_device) : -ENOMEM;
	if (error) {
		kmem_cache_destroy(pm_conns);
		kvfree(pm_table);
	}
	return error;
}

/**
 * pm_exit() - the module is unloaded: no descriptor, hooked socket or TIME_WAIT is left
 */
static void __exit pm_exit(void)
{
	int i;

	misc_deregister(&pm_device);
	rcu_barrier();
	kmem_cache_destroy(pm_conns); /* complains about any registration that is left */
	for (i = 0; i < PM_PROTOS && pm_protos[i]; i++) {
		module_put(pm_protos[i]->orig->owner);
		kfree(pm_protos[i]);
	}
	kvfree(pm_table);
}

module_init(pm_init);
module_exit(pm_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Tells programs when TCP connections are gone, TIME_WAIT included");
MODULE_VERSION("2");
