// SPDX-License-Identifier: GPL-2.0-only
/*
 * The switch's data plane: a tc classifier (clsact, direct action) on the ingress of every port
 * of a router. It answers control datagrams itself and rewrites the packets of flows that have
 * been handed over; the kernel routes them. docs/protocol.md says what each packet meets.
 *
 *   switch_maps.h     the maps            switch_rules.h    operations on the table
 *   switch_packet.h   finding headers     switch_owners.h   reverse entries of the table
 *   switch_rewrite.h  changing headers    switch_control.h  control datagrams
 *   switch_siphash.h  their MAC           switch_forward.h  TCP packets
 */
#include "switch_control.h"
#include "switch_forward.h"

static __always_inline int classify(struct __sk_buff *skb, bool ethernet)
{
	__u32 zero = 0;
	struct packet packet;
	struct prism_config *settings;

	if (!parse(skb, &packet, ethernet))
		return TC_ACT_UNSPEC;
	settings = bpf_map_lookup_elem(&config, &zero);
	if (!settings)
		return TC_ACT_UNSPEC;
	if (packet.protocol == IPPROTO_TCP)
		return handle_tcp(skb, &packet, settings);
	if (is_control(&packet, settings))
		return handle_control(skb, &packet, settings);
	return TC_ACT_UNSPEC;
}

/* Ports with an Ethernet header. */
SEC("tc")
int prism_switch(struct __sk_buff *skb)
{
	return classify(skb, true);
}

/* Ports without: the TUN device through which the agent puts held packets back. */
SEC("tc")
int prism_switch_l3(struct __sk_buff *skb)
{
	return classify(skb, false);
}

/* Not attached: the agent runs it on one unsigned control message. */
SEC("tc")
int prism_agent(struct __sk_buff *skb)
{
	return handle_agent(skb);
}

char _license[] SEC("license") = "GPL";
