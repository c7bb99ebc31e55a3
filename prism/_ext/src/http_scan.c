// SPDX-License-Identifier: Apache-2.0
#include "http_scan.h"

#include <string.h>

/* RFC 9110, section 5.6.2 (token), and section 5.5 (field values without controls). */
enum { TOKEN = 1, VALUE = 2, TARGET = 4, HOST = 8, DIGIT = 16 };

static const uint8_t *classes(void)
{
	static uint8_t table[256];
	static int ready;

	if (!ready) {
		for (int c = 0; c < 256; c++) {
			int digit = c >= '0' && c <= '9';
			int letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
			uint8_t is = 0;

			if (digit || letter || (c && c < 128 && strchr("!#$%&'*+-.^_`|~", c)))
				is |= TOKEN;
			if (c == '\t' || (c >= ' ' && c != 127))
				is |= VALUE;
			if (c >= '!' && c <= '~' && c != '#' && c != '\\')
				is |= TARGET;
			if (digit || letter || c == '.' || c == '-')
				is |= HOST;
			if (digit)
				is |= DIGIT;
			table[c] = is;
		}
		ready = 1;
	}
	return table;
}

struct reader {
	const uint8_t *class;
	const char *data;
	size_t at, end;
};

/* How many octets of a class follow; the reader is behind them afterwards. */
static uint32_t take(struct reader *in, uint8_t class)
{
	size_t begin = in->at;

	while (in->at < in->end && in->class[(uint8_t)in->data[in->at]] & class)
		in->at++;
	return (uint32_t)(in->at - begin);
}

static int expect(struct reader *in, const char *text, size_t size)
{
	if (in->end - in->at < size || memcmp(in->data + in->at, text, size))
		return 0;
	in->at += size;
	return 1;
}

#define EXPECT(in, text) expect(in, text, sizeof(text) - 1)

/* Whether a span is a word, which is given in lower case, in any case of letters. */
static int is_word(const char *data, struct prism_span span, const char *word)
{
	if (strlen(word) != span.size)
		return 0;
	for (uint32_t i = 0; i < span.size; i++) {
		char c = data[span.begin + i];

		if (c >= 'A' && c <= 'Z')
			c |= 0x20;
		if (c != word[i])
			return 0;
	}
	return 1;
}

/* One line "name: value"; 0 when it is not quite that. */
static int take_field(struct reader *in, struct prism_scan_field *field)
{
	uint32_t size;

	field->name.begin = (uint32_t)in->at;
	field->name.size = take(in, TOKEN);
	if (!field->name.size || !EXPECT(in, ":"))
		return 0;
	while (in->at < in->end && (in->data[in->at] == ' ' || in->data[in->at] == '\t'))
		in->at++;
	field->value.begin = (uint32_t)in->at;
	size = take(in, VALUE);
	if (!EXPECT(in, "\r\n"))
		return 0;
	while (size && strchr(" \t", in->data[field->value.begin + size - 1]))
		size--;
	field->value.size = size;
	return size > 0;
}

/* A length of at most 18 digits, which cannot overflow; -1 when it is anything else. */
static int64_t number(const char *data, struct prism_span span)
{
	int64_t value = 0;

	if (!span.size || span.size > 18)
		return -1;
	for (uint32_t i = 0; i < span.size; i++) {
		char c = data[span.begin + i];

		if (c < '0' || c > '9')
			return -1;
		value = value * 10 + (c - '0');
	}
	return value;
}

/* A name or an IPv4 address, with a port or without. */
static int is_host(const uint8_t *class, const char *data, struct prism_span span)
{
	struct reader in = {class, data, span.begin, span.begin + span.size};

	if (!take(&in, HOST))
		return 0;
	if (EXPECT(&in, ":"))
		take(&in, DIGIT);
	return in.at == in.end;
}

/* Fields that can change where a message ends, what it asks for or who answers. */
static int is_special(const char *data, struct prism_span name)
{
	static const char *const words[] = {
		"transfer-encoding",
		"upgrade",
		"expect",
		"te",
		"trailer",
		"keep-alive",
		"proxy-connection",
		"proxy-authenticate",
		"proxy-authorization",
	};
	const char first = data[name.begin] | 0x20;

	if (!strchr("tuekp", first))
		return 0;
	for (size_t i = 0; i < sizeof(words) / sizeof(*words); i++)
		if (is_word(data, name, words[i]))
			return 1;
	return 0;
}

static int known_method(const char *data, struct prism_span method)
{
	static const char *const words[] = {"GET", "HEAD", "PUT", "DELETE"};

	for (size_t i = 0; i < sizeof(words) / sizeof(*words); i++)
		if (strlen(words[i]) == method.size &&
		    !memcmp(data + method.begin, words[i], method.size))
			return 1;
	return 0;
}

/* Splits the target, and looks whether its path needs decoding or normalising. */
static void split_target(const char *data, struct prism_request_scan *out)
{
	const char *target = data + out->target.begin;
	const char *query = memchr(target, '?', out->target.size);

	out->path = query ? (uint32_t)(query - target) : out->target.size;
	out->plain_path = 1;
	for (uint32_t i = 0; i < out->path; i++) {
		char next = i + 1 < out->path ? target[i + 1] : 0;

		if (target[i] == '%' || (target[i] == '/' && (next == '/' || next == '.')))
			out->plain_path = 0;
	}
}

/* What a request's field says about the message; 0: more than is understood here. */
static int judge_request_field(const struct reader *in, const struct prism_scan_field *field,
			       struct prism_request_scan *out)
{
	const char *data = in->data;

	if (is_word(data, field->name, "host")) {
		if (out->host.size || !is_host(in->class, data, field->value))
			return 0;
		out->host = field->value;
	} else if (is_word(data, field->name, "content-length")) {
		if (out->body >= 0)
			return 0;
		out->body = number(data, field->value);
		return out->body >= 0;
	} else if (is_word(data, field->name, "connection")) {
		if (out->keep_alive >= 0)
			return 0;
		out->keep_alive = is_word(data, field->value, "keep-alive");
		return out->keep_alive || is_word(data, field->value, "close");
	} else if (is_special(data, field->name)) {
		return 0;
	}
	return 1;
}

int prism_scan_request(const char *data, size_t size, size_t max_target,
		       struct prism_request_scan *out)
{
	struct reader in = {classes(), data, 0, size > UINT32_MAX ? UINT32_MAX : size};

	out->host.begin = out->host.size = 0;
	out->body = out->keep_alive = -1;
	out->fields_count = 0;
	out->method.begin = 0;
	out->method.size = take(&in, TOKEN);
	if (!known_method(data, out->method) || !EXPECT(&in, " "))
		return 0;
	out->target.begin = (uint32_t)in.at;
	if (in.at >= in.end || data[in.at] != '/')
		return 0;
	out->target.size = take(&in, TARGET);
	if (out->target.size > max_target || !EXPECT(&in, " HTTP/1.1\r\n"))
		return 0;
	while (!EXPECT(&in, "\r\n")) {
		struct prism_scan_field *field = &out->fields[out->fields_count];

		if (out->fields_count == PRISM_SCAN_FIELDS || !take_field(&in, field) ||
		    !judge_request_field(&in, field, out))
			return 0;
		out->fields_count++;
	}
	out->length = (uint32_t)in.at;
	out->keep_alive = out->keep_alive != 0;
	split_target(data, out);
	return out->host.size > 0;
}

int prism_asks_for_less(const char *data, const struct prism_request_scan *request)
{
	for (unsigned int i = 0; i < request->fields_count; i++) {
		struct prism_span name = request->fields[i].name;

		if (is_word(data, name, "range"))
			return 1;
		name.size = name.size < 3 ? name.size : 3;
		if (is_word(data, name, "if-"))
			return 1;
	}
	return 0;
}

/* What a response's field says; 0: more than is understood here; 2: not to be passed on. */
static int judge_response_field(const char *data, const struct prism_scan_field *field,
				struct prism_response_scan *out)
{
	if (is_word(data, field->name, "content-length")) {
		if (out->body >= 0)
			return 0;
		out->body = number(data, field->value);
		return out->body >= 0 ? 2 : 0;
	}
	if (is_word(data, field->name, "connection"))
		return is_word(data, field->value, "keep-alive") ? 2 : 0;
	if (is_word(data, field->name, "date"))
		out->date = 1;
	else if (is_word(data, field->name, "server"))
		out->server = 1;
	return !is_special(data, field->name);
}

int prism_scan_response(const char *data, size_t size, struct prism_response_scan *out)
{
	struct reader in = {classes(), data, 0, size > UINT32_MAX ? UINT32_MAX : size};
	size_t at;

	out->body = -1;
	out->date = out->server = 0;
	out->fields_count = 0;
	if (!EXPECT(&in, "HTTP/1.1 "))
		return 0;
	at = in.at;
	if (take(&in, DIGIT) != 3 || !EXPECT(&in, " "))
		return 0;
	out->status = (data[at] - '0') * 100 + (data[at + 1] - '0') * 10 + (data[at + 2] - '0');
	if (out->status < 200 || out->status > 599 || out->status == 204 || out->status == 304)
		return 0;
	take(&in, VALUE); /* the phrase is made anew */
	if (!EXPECT(&in, "\r\n"))
		return 0;
	while (!EXPECT(&in, "\r\n")) {
		struct prism_scan_field *field = &out->fields[out->fields_count];
		int verdict;

		if (out->fields_count == PRISM_SCAN_FIELDS || !take_field(&in, field))
			return 0;
		verdict = judge_response_field(data, field, out);
		if (!verdict)
			return 0;
		out->fields_count += verdict == 1;
	}
	out->length = (uint32_t)in.at;
	return out->body >= 0;
}
