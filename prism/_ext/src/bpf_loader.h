/* SPDX-License-Identifier: Apache-2.0 */
/* Loads the switch's classifier, or takes up the tables that an earlier process left pinned. */
#ifndef PRISM_BPF_LOADER_H
#define PRISM_BPF_LOADER_H

#include <stddef.h>
#include <stdint.h>

#define PRISM_BPF_ERROR_SIZE 2048
#define PRISM_EVENTS_LIMIT   256

struct prism_bpf;

struct prism_bpf_options {
	const char *object;  /* path of the .bpf.o */
	const char *pin_dir; /* an existing directory on a bpffs */
	uint32_t max_rules;  /* of new tables; adopted ones keep their sizes */
	uint32_t max_nodes;
	uint32_t events_size; /* octets, a power of two and of the page size at least */
	int fresh;	      /* throw pinned tables away */
	uint64_t incarnation; /* of new tables */
};

struct prism_map_shape {
	int fd;
	uint32_t key_size;
	uint32_t value_size;
	uint32_t max_entries;
	uint64_t flags; /* BPF_F_LOCK where the values have a lock */
};

/*
 * All functions return 0 or a negative errno. `error` gets PRISM_BPF_ERROR_SIZE octets at most:
 * what libbpf had to say, the verifier's last lines included.
 *
 * -EPROTO: the pinned tables are of another version.
 */
int prism_bpf_open(const struct prism_bpf_options *options, struct prism_bpf **bpf, char *error);
void prism_bpf_close(struct prism_bpf *bpf);
int prism_bpf_adopted(const struct prism_bpf *bpf);
int prism_bpf_program(const struct prism_bpf *bpf, const char *name); /* fd or -ENOENT */
int prism_bpf_map(const struct prism_bpf *bpf, const char *name, struct prism_map_shape *shape);

/* Sums of the per-CPU counters; `sums` has room for `count`. */
int prism_bpf_stats(const struct prism_bpf *bpf, uint64_t *sums, uint32_t count);

/* Run a program once on `data` (at least 14 octets), which is replaced by what it left. */
int prism_bpf_run(int program, uint32_t flags, uint8_t *data, uint32_t *size, uint32_t *verdict);

/* Descriptor that polls readable when there are events, or a negative errno. */
int prism_bpf_events_fd(const struct prism_bpf *bpf);

/* Read up to PRISM_EVENTS_LIMIT events of `event_size` octets; returns their number. */
int prism_bpf_events(struct prism_bpf *bpf, uint8_t *buffer, uint32_t event_size);

#endif
