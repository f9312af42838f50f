/*
 * The readers of a benchmark: one process, one epoll, any number of event streams.
 *
 * It exists so that what is measured is the server. It parses no more of an event than it takes to count
 * one, and its cost per delivery is one recv(), a few memchr() calls and two numbers.
 *
 * Commands come as lines on standard input, replies leave as one JSON object a line on standard output:
 *
 *   target PATH ID                   adds to what the next "open" asks for: a path, and the Last-Event-ID that a
 *                                    client comes back with, "-" for one that is new. No reply
 *   open PORT COUNT SECONDS AT_ONCE EVENTS
 *                                    opens COUNT streams more to 127.0.0.1:PORT, of the targets in turn, no more
 *                                    than AT_ONCE of them on their way at a time, and answers
 *                                    {"reply": "open", "open": .., "failed": .., "nanoseconds": .., "trouble": ".."}
 *                                    as soon as each has had its response head, the first bytes of its body and
 *                                    EVENTS events that it missed, or SECONDS have passed
 *   counts                           {"reply": "counts", "least": .., "most": ..}: events of the clients that had
 *                                    fewest and most since they were opened or a round was started
 *   expect EVENTS SECONDS SETTLE STALL
 *                                    starts a round: {"reply": "armed", "clients": ..} at once, and
 *                                    {"reply": "round", ..} when every client has had EVENTS events and SETTLE
 *                                    seconds more have gone by (an event delivered twice shows up there),
 *                                    or SECONDS have passed, or STALL without a single event
 *   close                            closes all streams: {"reply": "closed", "clients": ..}
 *
 * Times are nanoseconds of CLOCK_MONOTONIC, which all processes of one machine share. An event is a block
 * with at least one "data:" line, ended by an empty line; comments, "retry:" blocks and chunk framing are
 * not events. The program ends when its standard input does.
 *
 * Data may begin with two numbers, as in "data: 17 123456789 xxx": the event's place in its round, from 0, and
 * when it was published. Of such events a round's reply tells how many came ("numbered"), how many were passed
 * over ("lost") or came again or too late ("doubled"), and "latency": the nanoseconds that 50, 90, 99, 99.9 and
 * 100 percent of the deliveries took at most, to some three percent.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_BYTES = 8192, RECEIVE_BYTES = 1 << 18, READY = 1024 };

/* One address has some 28,000 ports for connections to one server, those that were just closed among them. */
enum { CLIENTS_OF_AN_ADDRESS = 4000 };

/* Times are counted in buckets: 32 for each power of two. */
enum { BUCKETS_OF_A_POWER = 32, BUCKETS = 60 * BUCKETS_OF_A_POWER };

#define STDIN_INDEX UINT32_MAX

enum framing { PLAIN, CHUNK_SIZE, CHUNK_EXTENSION, CHUNK_DATA, CHUNK_END, BODY_OVER };

enum phase { CONNECTING, HEAD, BODY, GONE };

/* What of the two numbers at the beginning of an event's data has been read. */
enum numbers { NOT_YET, NUMBER, STAMP, ALL_READ, NONE };

struct client {
    int fd;
    enum phase phase;
    enum framing framing;
    int8_t prefix;   /* how much of "data:" this line has matched, -1: the line is something else */
    int8_t has_data; /* the block so far has a data line */
    int8_t opened;   /* it has had what "open" waits for */
    int8_t numbers;
    uint32_t number; /* of the event that is being read */
    uint32_t next;   /* the number that is due */
    uint64_t stamp;
    uint64_t chunk_left;
    long events; /* of this round, or since it was opened */
    uint32_t target;
    size_t head_length;
    char *head; /* only until the body begins */
};

static struct client *clients;
static uint32_t client_count;
static int epoll_fd;
static char received[RECEIVE_BYTES];

struct target {
    char path[1024];
    char id[256];
};

static struct target *targets;
static uint32_t target_count;

/* A server's listen queue is finite, and what overflows it is retried after a second: a measurement of
 * the kernel's patience. So no more than "at_once" connections are on their way at a time. */
static struct {
    int active;
    int port;
    uint32_t wanted, started, done, failed, at_once;
    long events;
    uint64_t began, deadline;
    char trouble[160];
} opening;

static struct {
    int active;
    long events;
    uint32_t waiting; /* open clients that have not had them all */
    uint64_t deadline, settle, settled_at;
    uint64_t stall, latest; /* when the latest event came, or the round began */
    uint64_t delivered, numbered, lost, doubled, longest;
    uint64_t latency[BUCKETS];
    uint64_t *first, *last;
    uint32_t *count;
} counting;

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void fail(const char *format, ...) {
    va_list arguments;
    printf("{\"reply\": \"error\", \"trouble\": \"");
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\"}\n");
    fflush(stdout);
    exit(1);
}

static void *need(void *memory) {
    if (!memory) fail("out of memory");
    return memory;
}

/* The first thing that went wrong is the one worth telling; it goes into JSON, so only tame characters. */
static void note_trouble(const char *what, size_t length) {
    size_t i, end = 0;
    if (opening.trouble[0]) return;
    for (i = 0; i < length && end < sizeof opening.trouble - 1; i++) {
        char character = what[i];
        if (character == '\r' || character == '\n') break;
        if (character < ' ' || character > '~' || character == '"' || character == '\\') character = '?';
        opening.trouble[end++] = character;
    }
    opening.trouble[end] = 0;
}

static void settle_if_complete(void) {
    if (counting.active && counting.waiting == 0 && counting.settled_at == 0) {
        counting.settled_at = now() + counting.settle;
    }
}

static void let_go(struct client *client) {
    if (client->phase == GONE) return;
    if (!client->opened) {
        opening.failed++;
    } else if (counting.active && client->events < counting.events) {
        counting.waiting--;
        settle_if_complete();
    }
    client->phase = GONE;
    close(client->fd);
    free(client->head);
    client->head = NULL;
}

static void is_open(struct client *client) {
    client->opened = 1;
    opening.done++;
}

static uint32_t bucket(uint64_t nanoseconds) {
    int power = 63 - __builtin_clzll(nanoseconds | BUCKETS_OF_A_POWER);
    return (uint32_t)((power - 5) * BUCKETS_OF_A_POWER + (int)(nanoseconds >> (power - 5)));
}

/* The most that a bucket holds. */
static uint64_t bound(uint32_t index) {
    uint32_t power = index / BUCKETS_OF_A_POWER;
    if (power < 2) return index;
    return ((uint64_t)(index % BUCKETS_OF_A_POWER + BUCKETS_OF_A_POWER + 1) << (power - 1)) - 1;
}

static void check_number(struct client *client, uint64_t at) {
    uint64_t took = at > client->stamp ? at - client->stamp : 0;
    counting.numbered++;
    counting.latency[bucket(took)]++;
    if (took > counting.longest) counting.longest = took;
    if (client->number < client->next) {
        counting.doubled++;
        return;
    }
    counting.lost += client->number - client->next;
    client->next = client->number + 1;
}

static void count_event(struct client *client, uint64_t at) {
    long index = client->events++;
    if (!client->opened && client->events >= opening.events) is_open(client);
    if (!counting.active) return;
    counting.delivered++;
    counting.latest = at;
    if (client->numbers == ALL_READ) check_number(client, at);
    if (index >= counting.events) return;
    if (counting.count[index]++ == 0) counting.first[index] = at;
    counting.last[index] = at;
    if (index + 1 == counting.events) {
        counting.waiting--;
        settle_if_complete();
    }
}

/* Takes what it can of the two numbers; a data line may be cut anywhere. Returns where it stopped. */
static const char *read_numbers(struct client *client, const char *at, const char *end) {
    while (at < end && client->numbers < ALL_READ) {
        char character = *at;
        int digit = character >= '0' && character <= '9' ? character - '0' : -1;
        switch (client->numbers) {
        case NOT_YET:
            if (digit >= 0) {
                client->numbers = NUMBER;
                client->number = 0;
                continue;
            }
            if (character != ' ' && character != '"') client->numbers = NONE;
            break;
        case NUMBER:
            if (digit >= 0) client->number = client->number * 10 + (uint32_t)digit;
            else client->numbers = character == ' ' ? STAMP : NONE;
            client->stamp = 0;
            break;
        default:
            if (digit >= 0) client->stamp = client->stamp * 10 + (uint64_t)digit;
            else client->numbers = character == ' ' ? ALL_READ : NONE;
        }
        if (client->numbers == NONE) break;
        at++;
    }
    return at;
}

static void scan(struct client *client, const char *at, const char *end, uint64_t time) {
    static const char field[] = "data:";
    while (at < end) {
        if (client->prefix < 0 || client->prefix == 5) {
            if (client->prefix == 5 && client->numbers < ALL_READ) at = read_numbers(client, at, end);
            const char *newline = memchr(at, '\n', (size_t)(end - at));
            if (!newline) return;
            at = newline + 1;
            client->prefix = 0;
            continue;
        }
        char character = *at++;
        if (character == '\n') {
            if (client->prefix == 0 && client->has_data) {
                client->has_data = 0;
                count_event(client, time);
                client->numbers = NOT_YET;
            }
            client->prefix = 0;
        } else if (character == '\r' && client->prefix == 0) {
            continue; /* a line may end with CR LF; then this is an empty one */
        } else if (character == field[client->prefix]) {
            if (++client->prefix == 5) client->has_data = 1;
        } else {
            client->prefix = -1;
        }
    }
}

static void body(struct client *client, const char *at, const char *end, uint64_t time) {
    if (at < end && !client->opened && opening.events == 0) is_open(client);
    while (at < end) {
        switch (client->framing) {
        case PLAIN:
            scan(client, at, end, time);
            return;
        case CHUNK_SIZE: {
            char character = *at++;
            int digit;
            if (character >= '0' && character <= '9') digit = character - '0';
            else if ((character | 32) >= 'a' && (character | 32) <= 'f') digit = (character | 32) - 'a' + 10;
            else {
                client->framing = CHUNK_EXTENSION;
                if (character == '\n') at--;
                break;
            }
            client->chunk_left = client->chunk_left * 16 + (uint64_t)digit;
            break;
        }
        case CHUNK_EXTENSION: {
            if (*at++ == '\n') client->framing = client->chunk_left ? CHUNK_DATA : BODY_OVER;
            break;
        }
        case CHUNK_DATA: {
            uint64_t here = (uint64_t)(end - at);
            if (here > client->chunk_left) here = client->chunk_left;
            scan(client, at, at + here, time);
            at += here;
            client->chunk_left -= here;
            if (client->chunk_left == 0) client->framing = CHUNK_END;
            break;
        }
        case CHUNK_END:
            if (*at++ == '\n') client->framing = CHUNK_SIZE;
            break;
        case BODY_OVER:
            return;
        }
    }
}

/* Returns 0 when the response is not a stream. */
static int head(struct client *client, const char *data, size_t length, uint64_t time) {
    size_t room = HEAD_BYTES - client->head_length;
    size_t taken = length < room ? length : room;
    char *end;
    memcpy(client->head + client->head_length, data, taken);
    client->head_length += taken;
    client->head[client->head_length] = 0;
    end = strstr(client->head, "\r\n\r\n");
    if (!end) {
        if (client->head_length < HEAD_BYTES) return 1;
        note_trouble("the response head is larger than 8 KiB", 38);
        return 0;
    }
    if (client->head_length < 12 || memcmp(client->head, "HTTP/1.", 7) || memcmp(client->head + 8, " 200", 4)) {
        note_trouble(client->head, client->head_length);
        return 0;
    }
    end[2] = 0;
    client->framing = strcasestr(client->head, "\r\ntransfer-encoding: chunked") ? CHUNK_SIZE : PLAIN;
    client->phase = BODY;
    {
        size_t head_total = (size_t)(end + 4 - client->head);
        size_t from_this_read = head_total - (client->head_length - taken);
        body(client, data + from_this_read, data + length, time);
    }
    free(client->head);
    client->head = NULL;
    return 1;
}

static void readable(struct client *client) {
    ssize_t length = recv(client->fd, received, sizeof received, 0);
    if (length < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (length <= 0) {
        if (!client->opened) {
            const char *reason = length ? strerror(errno) : "the server closed the connection";
            note_trouble(reason, strlen(reason));
        }
        let_go(client);
        return;
    }
    uint64_t time = now();
    if (client->phase == BODY) body(client, received, received + length, time);
    else if (!head(client, received, (size_t)length, time)) {
        let_go(client);
        return;
    }
    if (client->framing == BODY_OVER) let_go(client);
}

static void writable(struct client *client, uint32_t index) {
    char request[2048];
    const struct target *target = &targets[client->target];
    int length, error = 0, returns = strcmp(target->id, "-") != 0;
    socklen_t size = sizeof error;
    struct epoll_event interest = {.events = EPOLLIN, .data.u32 = index};
    getsockopt(client->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        note_trouble(strerror(error), strlen(strerror(error)));
        let_go(client);
        return;
    }
    length = snprintf(request, sizeof request,
                      "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: text/event-stream\r\n%s%s%s\r\n",
                      target->path, opening.port, returns ? "Last-Event-ID: " : "", returns ? target->id : "",
                      returns ? "\r\n" : "");
    if (send(client->fd, request, (size_t)length, MSG_NOSIGNAL) != length) {
        note_trouble("the request could not be sent", 29);
        let_go(client);
        return;
    }
    client->phase = HEAD;
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, client->fd, &interest);
}

static void start_one(uint32_t index) {
    struct client *client = &clients[index];
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)opening.port)};
    struct sockaddr_in source = {.sin_family = AF_INET};
    struct epoll_event interest = {.events = EPOLLOUT, .data.u32 = index};
    int yes = 1;
    memset(client, 0, sizeof *client);
    client->target = (opening.started - 1) % target_count;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    client->head = need(malloc(HEAD_BYTES + 1));
    client->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (client->fd < 0) fail("no socket for client %u: %s", index, strerror(errno));
    source.sin_addr.s_addr = htonl(INADDR_LOOPBACK + index / CLIENTS_OF_AN_ADDRESS);
    /* The port is left to connect(), which may take one that is in use to another destination. */
    setsockopt(client->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &yes, sizeof yes);
    if (bind(client->fd, (struct sockaddr *)&source, sizeof source) < 0) fail("bind: %s", strerror(errno));
    if (connect(client->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS) {
        note_trouble(strerror(errno), strlen(strerror(errno)));
        let_go(client);
        return;
    }
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, client->fd, &interest) < 0) fail("epoll: %s", strerror(errno));
}

static void keep_opening(void) {
    while (opening.active && opening.started < opening.wanted &&
           opening.started - opening.done - opening.failed < opening.at_once) {
        uint32_t index = client_count++;
        opening.started++;
        start_one(index);
    }
    if (!opening.active) return;
    int complete = opening.done + opening.failed == opening.wanted;
    if (!complete && now() < opening.deadline) return;
    if (!complete) note_trouble("not all streams opened in time", 30);
    printf("{\"reply\": \"open\", \"open\": %u, \"failed\": %u, \"nanoseconds\": %llu, \"trouble\": \"%s\"}\n",
           opening.done, opening.wanted - opening.done, (unsigned long long)(now() - opening.began), opening.trouble);
    fflush(stdout);
    opening.active = 0;
    target_count = 0;
}

static void print_times(const char *name, const uint64_t *times) {
    long i;
    printf(", \"%s\": [", name);
    for (i = 0; i < counting.events; i++) printf(i ? ", %llu" : "%llu", (unsigned long long)times[i]);
    printf("]");
}

/* What the two numbers of the events told; a client that was left behind has lost the rest of its events. */
static void print_numbered(void) {
    static const double percents[] = {50, 90, 99, 99.9, 100};
    uint32_t i, at = 0;
    uint64_t seen = counting.latency[0], lost = counting.lost;
    for (i = 0; counting.numbered && i < client_count; i++) {
        if (clients[i].opened && clients[i].next < counting.events) lost += (uint64_t)counting.events - clients[i].next;
    }
    printf(", \"numbered\": %llu, \"lost\": %llu, \"doubled\": %llu, \"latency\": [",
           (unsigned long long)counting.numbered, (unsigned long long)lost, (unsigned long long)counting.doubled);
    for (i = 0; counting.numbered && i < sizeof percents / sizeof *percents; i++) {
        while (at < BUCKETS - 1 && (double)seen < percents[i] / 100 * (double)counting.numbered) {
            seen += counting.latency[++at];
        }
        uint64_t most = bound(at) < counting.longest ? bound(at) : counting.longest;
        printf(i ? ", %llu" : "%llu", (unsigned long long)most);
    }
    printf("]");
}

/* Over every client that was ever open: one that has left still counts with what it had. */
static uint32_t extremes(long *least, long *most) {
    uint32_t i, seen = 0;
    *least = *most = 0;
    for (i = 0; i < client_count; i++) {
        if (!clients[i].opened) continue;
        if (!seen || clients[i].events < *least) *least = clients[i].events;
        if (!seen || clients[i].events > *most) *most = clients[i].events;
        seen++;
    }
    return seen;
}

static void finish_round(void) {
    uint32_t i, ended = 0, seen;
    long least, most;
    if (!counting.active) return;
    uint64_t time = now();
    if (!(counting.settled_at && time >= counting.settled_at) && time < counting.deadline &&
        time < counting.latest + counting.stall) {
        return;
    }
    seen = extremes(&least, &most);
    for (i = 0; i < client_count; i++) ended += clients[i].opened && clients[i].phase == GONE;
    printf("{\"reply\": \"round\", \"clients\": %u, \"ended\": %u, \"delivered\": %llu, \"least\": %ld, \"most\": %ld",
           seen, ended, (unsigned long long)counting.delivered, least, most);
    print_numbered();
    print_times("first", counting.first);
    print_times("last", counting.last);
    printf("}\n");
    fflush(stdout);
    free(counting.first);
    free(counting.last);
    free(counting.count);
    memset(&counting, 0, sizeof counting);
}

static void command_target(const char *path, const char *id) {
    if (opening.active) fail("busy");
    targets = need(realloc(targets, (target_count + 1) * sizeof *targets));
    snprintf(targets[target_count].path, sizeof targets->path, "%s", path);
    snprintf(targets[target_count].id, sizeof targets->id, "%s", id);
    target_count++;
}

static void command_open(int port, uint32_t count, double seconds, uint32_t at_once, long events) {
    struct rlimit files;
    if (opening.active || counting.active) fail("busy");
    if (!target_count) fail("no target");
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if ((rlim_t)client_count + count + 16 > files.rlim_cur) {
        fail("%u streams need more open files than the %llu allowed here", client_count + count,
             (unsigned long long)files.rlim_cur);
    }
    clients = need(realloc(clients, (client_count + count + 1) * sizeof *clients));
    memset(&opening, 0, sizeof opening);
    opening.active = 1;
    opening.port = port;
    opening.wanted = count;
    opening.began = now();
    opening.deadline = opening.began + (uint64_t)(seconds * 1e9);
    opening.at_once = at_once;
    opening.events = events;
}

static void command_expect(long events, double seconds, double settle, double stall) {
    uint32_t i;
    size_t entries = (size_t)events + 1;
    if (opening.active || counting.active) fail("busy");
    memset(&counting, 0, sizeof counting);
    counting.first = need(calloc(entries, sizeof *counting.first));
    counting.last = need(calloc(entries, sizeof *counting.last));
    counting.count = need(calloc(entries, sizeof *counting.count));
    counting.events = events;
    counting.settle = (uint64_t)(settle * 1e9);
    counting.stall = (uint64_t)(stall * 1e9);
    counting.latest = now();
    counting.deadline = counting.latest + (uint64_t)(seconds * 1e9);
    counting.active = 1;
    for (i = 0; i < client_count; i++) {
        clients[i].events = 0;
        clients[i].next = 0;
        if (clients[i].opened && clients[i].phase != GONE) counting.waiting++;
    }
    printf("{\"reply\": \"armed\", \"clients\": %u}\n", counting.waiting);
    fflush(stdout);
    if (events == 0) counting.waiting = 0;
    settle_if_complete();
}

static void command_counts(void) {
    long least, most;
    extremes(&least, &most);
    printf("{\"reply\": \"counts\", \"least\": %ld, \"most\": %ld}\n", least, most);
    fflush(stdout);
}

static void command_close(void) {
    uint32_t i, closed = 0;
    if (opening.active || counting.active) fail("busy");
    for (i = 0; i < client_count; i++) {
        if (clients[i].phase == GONE) continue;
        closed++;
        let_go(&clients[i]);
    }
    client_count = 0;
    printf("{\"reply\": \"closed\", \"clients\": %u}\n", closed);
    fflush(stdout);
}

static void command(const char *line) {
    int port;
    uint32_t count, at_once;
    long events;
    double seconds, settle, stall;
    char path[1024], id[256];
    if (sscanf(line, "target %1023s %255s", path, id) == 2) {
        command_target(path, id);
    } else if (sscanf(line, "open %d %u %lf %u %ld", &port, &count, &seconds, &at_once, &events) == 5) {
        command_open(port, count, seconds, at_once, events);
    } else if (sscanf(line, "expect %ld %lf %lf %lf", &events, &seconds, &settle, &stall) == 4 && events >= 0) {
        command_expect(events, seconds, settle, stall);
    } else if (!strcmp(line, "counts")) {
        command_counts();
    } else if (!strcmp(line, "close")) {
        command_close();
    } else {
        fail("unknown command");
    }
}

static void commands(void) {
    static char line[4096];
    static size_t length;
    char *newline;
    ssize_t got = read(0, line + length, sizeof line - 1 - length);
    if (got < 0 && errno == EINTR) return;
    if (got <= 0) exit(0);
    length += (size_t)got;
    line[length] = 0;
    while ((newline = strchr(line, '\n'))) {
        *newline = 0;
        command(line);
        length -= (size_t)(newline + 1 - line);
        memmove(line, newline + 1, length + 1);
    }
    if (length == sizeof line - 1) fail("a command is too long");
}

/* Milliseconds until something has to be done by the clock alone, -1: nothing. */
static int patience(void) {
    uint64_t due = 0, time;
    if (opening.active) due = opening.deadline;
    if (counting.active) {
        due = counting.deadline;
        if (counting.latest + counting.stall < due) due = counting.latest + counting.stall;
        if (counting.settled_at && counting.settled_at < due) due = counting.settled_at;
    }
    if (!due) return -1;
    time = now();
    return due <= time ? 0 : (int)((due - time) / 1000000u) + 1;
}

int main(void) {
    static struct epoll_event ready[READY];
    struct epoll_event interest = {.events = EPOLLIN, .data.u32 = STDIN_INDEX};
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0 || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, 0, &interest) < 0) {
        fail("standard input must be a pipe: %s", strerror(errno));
    }
    for (;;) {
        int i, count = epoll_wait(epoll_fd, ready, READY, patience());
        if (count < 0 && errno != EINTR) fail("epoll: %s", strerror(errno));
        int has_command = 0;
        for (i = 0; i < count; i++) {
            uint32_t index = ready[i].data.u32;
            if (index == STDIN_INDEX) {
                has_command = 1;
                continue;
            }
            struct client *client = &clients[index];
            if (client->phase == CONNECTING) writable(client, index);
            else if (client->phase != GONE) readable(client);
        }
        /* After the sockets: a command may move or close the clients the batch points to. */
        if (has_command) commands();
        keep_opening();
        finish_round();
    }
}
