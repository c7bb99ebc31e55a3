/* SPDX-License-Identifier: Apache-2.0 */
#include "bpf_loader.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "prism_abi.h"

#define PATH_SIZE 512

struct prism_bpf {
	struct bpf_object *object;
	struct ring_buffer *ring;
	int adopted;
	/* where the ring's callback puts events */
	uint8_t *events;
	uint32_t event_size;
	int event_count;
};

/* The maps that outlive a process. config comes last: its pin says that the others are there. */
static const char *const PINNED[] = {"rules",	 "owners", "nodes",  "agent", "stats",
				     "syn_pass", "former", "events", "config"};
#define PINNED_COUNT (sizeof(PINNED) / sizeof(PINNED[0]))

/* ---- what libbpf says: kept for the error message, under a lock, for it is per process ---- */

static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;
static char *log_text;

static int keep_log(enum libbpf_print_level level, const char *format, va_list arguments)
{
	char line[1024];
	size_t have, more;

	if (level != LIBBPF_WARN || !log_text)
		return 0;
	vsnprintf(line, sizeof(line), format, arguments);
	have = strlen(log_text);
	more = strlen(line);
	if (have + more >= PRISM_BPF_ERROR_SIZE) { /* the end of a log says why */
		size_t drop = have + more + 1 - PRISM_BPF_ERROR_SIZE;

		drop = drop < have ? drop : have;
		memmove(log_text, log_text + drop, have - drop + 1);
		have -= drop;
	}
	memcpy(log_text + have, line, more + 1);
	return 0;
}

/* ---- pins ---- */

static int pin_path(char *path, const char *directory, const char *name)
{
	int size = snprintf(path, PATH_SIZE, "%s/%s", directory, name);

	return size < 0 || size >= PATH_SIZE ? -ENAMETOOLONG : 0;
}

static int pinned_map(const char *directory, const char *name)
{
	char path[PATH_SIZE];
	int error = pin_path(path, directory, name);

	return error ? error : bpf_obj_get(path);
}

/* 1: complete tables of this version, 0: none (or never finished), -EPROTO: another version. */
static int examine_pins(const char *directory)
{
	struct prism_config config;
	struct bpf_map_info info = {};
	__u32 size = sizeof(info), zero = 0;
	int fd = pinned_map(directory, "config"), error;

	if (fd == -ENOENT)
		return 0;
	if (fd < 0)
		return fd;
	error = bpf_obj_get_info_by_fd(fd, &info, &size);
	if (!error && info.value_size != sizeof(config))
		error = -EPROTO;
	if (!error)
		error = bpf_map_lookup_elem(fd, &zero, &config);
	close(fd);
	if (error)
		return error;
	return config.table_version == PRISM_TABLE_VERSION ? 1 : -EPROTO;
}

static int remove_pins(const char *directory)
{
	char path[PATH_SIZE];

	/* In reverse: without config, what is left does not count as tables. */
	for (size_t i = PINNED_COUNT; i-- > 0;) {
		int error = pin_path(path, directory, PINNED[i]);

		if (error)
			return error;
		if (unlink(path) && errno != ENOENT)
			return -errno;
	}
	return 0;
}

static int reuse_pins(struct bpf_object *object, const char *directory)
{
	for (size_t i = 0; i < PINNED_COUNT; i++) {
		struct bpf_map *map = bpf_object__find_map_by_name(object, PINNED[i]);
		struct bpf_map_info info = {};
		__u32 size = sizeof(info);
		int fd = pinned_map(directory, PINNED[i]), error;

		if (!map || fd < 0)
			return fd < 0 && fd != -ENOENT ? fd : -EPROTO;
		error = bpf_obj_get_info_by_fd(fd, &info, &size);
		if (!error &&
		    (info.type != bpf_map__type(map) || info.key_size != bpf_map__key_size(map) ||
		     info.value_size != bpf_map__value_size(map)))
			error = -EPROTO;
		if (!error)
			error = bpf_map__reuse_fd(map, fd); /* a duplicate of it */
		close(fd);
		if (error)
			return error;
	}
	return 0;
}

static int size_maps(struct bpf_object *object, const struct prism_bpf_options *options)
{
	const struct {
		const char *name;
		uint32_t entries;
	} sizes[] = {
		{"rules", options->max_rules},
		{"owners", options->max_rules},
		{"nodes", options->max_nodes},
		{"events", options->events_size},
	};

	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		struct bpf_map *map = bpf_object__find_map_by_name(object, sizes[i].name);
		int error = map ? bpf_map__set_max_entries(map, sizes[i].entries) : -ENOENT;

		if (error)
			return error;
	}
	return 0;
}

static int pin_maps(struct bpf_object *object, const struct prism_bpf_options *options)
{
	struct prism_config config = {.table_version = PRISM_TABLE_VERSION,
				      .incarnation = options->incarnation};
	char path[PATH_SIZE];
	__u32 zero = 0;
	int error = bpf_map_update_elem(bpf_object__find_map_fd_by_name(object, "config"), &zero,
					&config, BPF_ANY);

	for (size_t i = 0; !error && i < PINNED_COUNT; i++) {
		error = pin_path(path, options->pin_dir, PINNED[i]);
		if (!error)
			error = bpf_obj_pin(bpf_object__find_map_fd_by_name(object, PINNED[i]),
					    path);
	}
	return error;
}

/* Pin the programs under their names, in place of the ones before. */
static int pin_programs(struct bpf_object *object, const char *directory)
{
	char path[PATH_SIZE], fresh[PATH_SIZE + 4];
	struct bpf_program *program;

	bpf_object__for_each_program(program, object)
	{
		int error = pin_path(path, directory, bpf_program__name(program));

		if (error)
			return error;
		snprintf(fresh, sizeof(fresh), "%s_new", path);
		unlink(fresh); /* of a process that died right here */
		error = bpf_obj_pin(bpf_program__fd(program), fresh);
		if (error)
			return error;
		if (rename(fresh, path)) {
			error = -errno;
			unlink(fresh);
			return error;
		}
	}
	return 0;
}

/* ---- open and close ---- */

static int load(struct prism_bpf *bpf, const struct prism_bpf_options *options)
{
	int found = options->fresh ? 0 : examine_pins(options->pin_dir);
	int error;

	if (found < 0)
		return found;
	bpf->adopted = found;
	bpf->object = bpf_object__open_file(options->object, NULL);
	if (!bpf->object)
		return -errno;
	if (found)
		error = reuse_pins(bpf->object, options->pin_dir);
	else
		error = remove_pins(options->pin_dir) ?: size_maps(bpf->object, options);
	error = error ?: bpf_object__load(bpf->object);
	if (!error && !found)
		error = pin_maps(bpf->object, options);
	return error ?: pin_programs(bpf->object, options->pin_dir);
}

static int take_event(void *context, void *data, size_t size)
{
	struct prism_bpf *bpf = context;

	if (size == bpf->event_size)
		memcpy(bpf->events + (size_t)bpf->event_size * bpf->event_count++, data, size);
	return bpf->event_count == PRISM_EVENTS_LIMIT ? -ENOBUFS : 0; /* taken all the same */
}

int prism_bpf_open(const struct prism_bpf_options *options, struct prism_bpf **result, char *error)
{
	struct prism_bpf *bpf = calloc(1, sizeof(*bpf));
	libbpf_print_fn_t before;
	int code;

	error[0] = '\0';
	if (!bpf)
		return -ENOMEM;
	pthread_mutex_lock(&log_lock);
	log_text = error;
	before = libbpf_set_print(keep_log);
	code = load(bpf, options);
	if (!code) {
		bpf->ring = ring_buffer__new(bpf_object__find_map_fd_by_name(bpf->object, "events"),
					     take_event, bpf, NULL);
		if (!bpf->ring)
			code = -errno;
	}
	libbpf_set_print(before);
	log_text = NULL;
	pthread_mutex_unlock(&log_lock);
	if (code) {
		prism_bpf_close(bpf);
		return code;
	}
	*result = bpf;
	return 0;
}

void prism_bpf_close(struct prism_bpf *bpf)
{
	if (!bpf)
		return;
	ring_buffer__free(bpf->ring);
	bpf_object__close(bpf->object);
	free(bpf);
}

int prism_bpf_adopted(const struct prism_bpf *bpf)
{
	return bpf->adopted;
}

int prism_bpf_program(const struct prism_bpf *bpf, const char *name)
{
	struct bpf_program *program = bpf_object__find_program_by_name(bpf->object, name);

	return program ? bpf_program__fd(program) : -ENOENT;
}

int prism_bpf_map(const struct prism_bpf *bpf, const char *name, struct prism_map_shape *shape)
{
	struct bpf_map *map = bpf_object__find_map_by_name(bpf->object, name);
	struct bpf_map_info info = {};
	__u32 size = sizeof(info);
	int error;

	if (!map)
		return -ENOENT;
	error = bpf_obj_get_info_by_fd(bpf_map__fd(map), &info, &size);
	if (error)
		return error;
	shape->fd = bpf_map__fd(map);
	shape->key_size = info.key_size;
	shape->value_size = info.value_size;
	shape->max_entries = info.max_entries;
	shape->flags = !strcmp(name, "rules") || !strcmp(name, "nodes") ? BPF_F_LOCK : 0;
	return 0;
}

/* ---- what is not plain map access ---- */

int prism_bpf_stats(const struct prism_bpf *bpf, uint64_t *sums, uint32_t count)
{
	int fd = bpf_object__find_map_fd_by_name(bpf->object, "stats");
	int cpus = libbpf_num_possible_cpus(), error = 0;
	uint64_t *values;

	if (cpus < 0)
		return cpus;
	values = calloc(cpus, sizeof(*values));
	if (!values)
		return -ENOMEM;
	for (uint32_t i = 0; i < count && !error; i++) {
		error = bpf_map_lookup_elem(fd, &i, values);
		sums[i] = 0;
		for (int cpu = 0; cpu < cpus; cpu++)
			sums[i] += values[cpu];
	}
	free(values);
	return error;
}

int prism_bpf_run(int program, uint32_t flags, uint8_t *data, uint32_t *size, uint32_t *verdict)
{
	LIBBPF_OPTS(bpf_test_run_opts, options, .data_in = data, .data_size_in = *size,
		    .data_out = data, .data_size_out = *size, .repeat = 1, .flags = flags);
	int error = bpf_prog_test_run_opts(program, &options);

	*size = options.data_size_out;
	*verdict = options.retval;
	return error;
}

int prism_bpf_events_fd(const struct prism_bpf *bpf)
{
	return ring_buffer__epoll_fd(bpf->ring);
}

int prism_bpf_events(struct prism_bpf *bpf, uint8_t *buffer, uint32_t event_size)
{
	int result;

	bpf->events = buffer;
	bpf->event_size = event_size;
	bpf->event_count = 0;
	result = ring_buffer__consume(bpf->ring);
	bpf->events = NULL;
	return result < 0 && result != -ENOBUFS ? result : bpf->event_count;
}
