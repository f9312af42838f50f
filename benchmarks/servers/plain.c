/*
 * The limit that the others are compared with: an event stream server that makes one send() for each event and
 * client, and does nothing else. No history, no limits, one thread, one epoll.
 *
 *   plain FD         serves the listening socket FD; see endpoint.py for what it answers
 *
 * Responses are chunked, as the others' are. The chunk is made once for an event. What a socket has no room for
 * is kept for it alone and sent when it has.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { READY = 512, REQUEST_BYTES = 4096 };

#define STREAM_HEAD                                                                                                   \
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"                               \
    "Transfer-Encoding: chunked\r\n\r\nd\r\nretry: 3000\n\n\r\n"
#define PING "8\r\n: ping\n\n\r\n"

struct connection {
    int fd;
    int key;   /* of a stream; -1: it is none (yet) */
    int place; /* among the connections of its key */
    int gone;
    int last; /* its client asked for no more than one answer */
    size_t waiting; /* bytes that the socket had no room for */
    char *rest;     /* these, or the request as far as it has come */
    size_t length;
    struct connection *next_gone;
};

/* The first key is "bench", the one behind it "bench-0" and so on. */
struct key {
    struct connection **connections;
    int count, room;
};

static struct key *keys;
static int key_count;
static int epoll_fd, ping_timer, pace_timer, listener;
static struct connection *gone;
static unsigned long identifier;

static struct {
    struct connection *asker; /* NULL: it has gone away meanwhile */
    int active;
    long events, done, size;
    int keys;
    uint64_t interval, due;
    uint64_t *started, *returned;
} series;

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void *need(void *memory) {
    if (!memory) abort();
    return memory;
}

static void watch(struct connection *connection, uint32_t events) {
    struct epoll_event interest = {.events = events, .data.ptr = connection};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, connection->fd, &interest);
}

/* It is freed after the batch of epoll's that may still name it. */
static void leave(struct connection *connection) {
    if (connection->gone) return;
    if (connection->key >= 0) {
        struct key *key = &keys[connection->key];
        struct connection *last = key->connections[--key->count];
        key->connections[connection->place] = last;
        last->place = connection->place;
    }
    if (series.asker == connection) series.asker = NULL;
    close(connection->fd);
    connection->gone = 1;
    connection->next_gone = gone;
    gone = connection;
}

static void keep(struct connection *connection, const char *bytes, size_t length) {
    connection->rest = need(realloc(connection->rest, connection->waiting + length));
    memcpy(connection->rest + connection->waiting, bytes, length);
    connection->waiting += length;
}

static void deliver(struct connection *connection, const char *bytes, size_t length) {
    ssize_t sent;
    if (connection->waiting) {
        keep(connection, bytes, length);
        return;
    }
    sent = send(connection->fd, bytes, length, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent == (ssize_t)length) return;
    if (sent < 0) {
        if (errno != EAGAIN) {
            /* Whoever goes through the key's connections must not have them moved: the epoll tells of it. */
            shutdown(connection->fd, SHUT_RDWR);
            return;
        }
        sent = 0;
    }
    keep(connection, bytes + sent, length - (size_t)sent);
    watch(connection, EPOLLIN | EPOLLOUT);
}

static void send_rest(struct connection *connection) {
    ssize_t sent = send(connection->fd, connection->rest, connection->waiting, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
        if (errno != EAGAIN) leave(connection);
        return;
    }
    connection->waiting -= (size_t)sent;
    memmove(connection->rest, connection->rest + sent, connection->waiting);
    if (connection->waiting == 0) {
        free(connection->rest);
        connection->rest = NULL;
        watch(connection, EPOLLIN);
    }
}

static void send_to_key(int index, const char *bytes, size_t length) {
    int i;
    if (index >= key_count) return;
    for (i = 0; i < keys[index].count; i++) deliver(keys[index].connections[i], bytes, length);
}

static void publish(int key, long number, uint64_t at, long size) {
    static char frame[1 << 17], chunk[(1 << 17) + 32];
    int head, numbers, length;
    head = sprintf(frame, "id: %lu\nevent: tick\ndata: ", ++identifier);
    numbers = sprintf(frame + head, "%ld %llu ", number, (unsigned long long)at);
    if (size < numbers) size = numbers;
    memset(frame + head + numbers, 'x', (size_t)(size - numbers));
    memcpy(frame + head + size, "\n\n", 2);
    length = sprintf(chunk, "%lx\r\n", (unsigned long)(head + size + 2));
    memcpy(chunk + length, frame, (size_t)(head + size + 2));
    length += head + (int)size + 2;
    memcpy(chunk + length, "\r\n", 2);
    send_to_key(key, chunk, (size_t)length + 2);
}

static void answer(struct connection *connection, const char *status, const char *type, const char *body) {
    size_t room = strlen(body) + 256;
    char *response = need(malloc(room));
    int length = snprintf(response, room, "HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\n\r\n%s", status,
                          type, strlen(body), body);
    deliver(connection, response, (size_t)length);
    free(response);
    if (connection->last) shutdown(connection->fd, SHUT_WR); /* behind what is sent; the client's end is read then */
}

static char *print_times(char *at, const char *name, const uint64_t *times) {
    long i;
    at += sprintf(at, "\"%s\": [", name);
    for (i = 0; i < series.events; i++) at += sprintf(at, i ? ", %llu" : "%llu", (unsigned long long)times[i]);
    return at + sprintf(at, "]");
}

static void finish_series(void) {
    char *body = need(malloc((size_t)series.events * 2 * 24 + 100)), *at = body;
    at += sprintf(at, "{");
    at = print_times(at, "started", series.started);
    at += sprintf(at, ", ");
    at = print_times(at, "returned", series.returned);
    sprintf(at, "}");
    if (series.asker) answer(series.asker, "200 OK", "application/json", body);
    free(body);
    free(series.started);
    free(series.returned);
    memset(&series, 0, sizeof series);
}

/* Publishes what is due; without an interval that is everything. */
static void continue_series(void) {
    while (series.done < series.events) {
        int key;
        if (series.interval) {
            if (now() < series.due) {
                struct itimerspec at = {.it_value = {.tv_sec = (time_t)(series.due / 1000000000u),
                                                     .tv_nsec = (long)(series.due % 1000000000u)}};
                timerfd_settime(pace_timer, TFD_TIMER_ABSTIME, &at, NULL);
                return;
            }
            series.due += series.interval;
        }
        series.started[series.done] = now();
        if (series.keys == 0) publish(0, series.done, series.started[series.done], series.size);
        for (key = 1; key <= series.keys; key++) publish(key, series.done, series.started[series.done], series.size);
        series.returned[series.done++] = now();
    }
    finish_series();
}

static double parameter(const char *target, const char *name, double otherwise) {
    const char *at = strstr(target, name);
    return at ? atof(at + strlen(name)) : otherwise;
}

static void begin_series(struct connection *connection, const char *target) {
    if (series.active) {
        answer(connection, "409 Conflict", "text/plain", "busy\n");
        return;
    }
    series.active = 1;
    series.asker = connection;
    series.events = (long)parameter(target, "events=", 1);
    series.interval = (uint64_t)(parameter(target, "interval=", 0) * 1e9);
    series.size = (long)parameter(target, "size=", 100);
    series.keys = (int)parameter(target, "keys=", 0);
    if (series.size > 1 << 16) series.size = 1 << 16;
    series.due = now() + series.interval;
    series.started = need(calloc((size_t)series.events + 1, sizeof *series.started));
    series.returned = need(calloc((size_t)series.events + 1, sizeof *series.returned));
    continue_series();
}

static void begin_stream(struct connection *connection, const char *target) {
    const char *number = strstr(target, "connectKey=bench-");
    int index = number ? atoi(number + strlen("connectKey=bench-")) + 1 : 0, yes = 1;
    struct key *key;
    if (index < 0 || index > 1 << 20) index = 0;
    if (index >= key_count) {
        keys = need(realloc(keys, (size_t)(index + 1) * sizeof *keys));
        memset(keys + key_count, 0, (size_t)(index + 1 - key_count) * sizeof *keys);
        key_count = index + 1;
    }
    key = &keys[index];
    if (key->count == key->room) {
        key->room = key->room ? key->room * 2 : 1;
        key->connections = need(realloc(key->connections, (size_t)key->room * sizeof *key->connections));
    }
    connection->key = index;
    connection->place = key->count;
    key->connections[key->count++] = connection;
    setsockopt(connection->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    deliver(connection, STREAM_HEAD, sizeof STREAM_HEAD - 1);
}

static void request(struct connection *connection, const char *head) {
    if (!strncmp(head, "GET /stream", 11)) begin_stream(connection, head + 4);
    else if (!strncmp(head, "POST /publish", 13)) begin_series(connection, head + 5);
    else if (!strncmp(head, "GET /view ", 10)) answer(connection, "200 OK", "text/plain", "an ordinary view\n");
    else answer(connection, "404 Not Found", "text/plain", "not found\n");
}

static void readable(struct connection *connection) {
    char bytes[REQUEST_BYTES], *end;
    ssize_t got = recv(connection->fd, bytes, sizeof bytes, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        leave(connection);
        return;
    }
    /* A stream's client has no more to say, and who has an answer waiting does not ask yet. */
    if (connection->key >= 0 || connection->waiting) return;
    if (connection->length + (size_t)got > REQUEST_BYTES) {
        leave(connection);
        return;
    }
    connection->rest = need(realloc(connection->rest, connection->length + (size_t)got + 1));
    memcpy(connection->rest + connection->length, bytes, (size_t)got);
    connection->length += (size_t)got;
    connection->rest[connection->length] = 0;
    end = strstr(connection->rest, "\r\n\r\n");
    if (!end) return;
    char *head = connection->rest;
    char *line_end = strchr(head, '\r');
    *line_end = 0;
    connection->rest = NULL;
    connection->length = 0;
    connection->last = strcasestr(line_end + 1, "\nConnection: close") != NULL;
    request(connection, head);
    free(head);
}

static void accept_some(void) {
    for (;;) {
        struct epoll_event interest = {.events = EPOLLIN};
        struct connection *connection;
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return;
        connection = need(calloc(1, sizeof *connection));
        connection->fd = fd;
        connection->key = -1;
        interest.data.ptr = connection;
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &interest);
    }
}

static void add(int fd, void *what) {
    struct epoll_event interest = {.events = EPOLLIN, .data.ptr = what};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &interest) < 0) abort();
}

int main(int count, char **arguments) {
    static struct epoll_event ready[READY];
    const char *ping = getenv("BENCHMARK_PING_SECONDS");
    double seconds = ping ? atof(ping) : 10;
    struct itimerspec beat = {.it_value.tv_sec = (time_t)seconds,
                              .it_value.tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)};
    if (count != 2) return 2;
    listener = atoi(arguments[1]);
    if (fcntl(listener, F_SETFL, fcntl(listener, F_GETFL) | O_NONBLOCK) < 0) return 2;
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    ping_timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    pace_timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    beat.it_interval = beat.it_value;
    timerfd_settime(ping_timer, 0, &beat, NULL);
    add(listener, &listener);
    add(ping_timer, &ping_timer);
    add(pace_timer, &pace_timer);
    for (;;) {
        int i, found = epoll_wait(epoll_fd, ready, READY, -1);
        for (i = 0; i < found; i++) {
            struct connection *connection = ready[i].data.ptr;
            uint64_t expirations;
            if (ready[i].data.ptr == &listener) {
                accept_some();
            } else if (ready[i].data.ptr == &ping_timer) {
                int key;
                if (read(ping_timer, &expirations, sizeof expirations) < 0) continue;
                for (key = 0; key < key_count; key++) send_to_key(key, PING, sizeof PING - 1);
            } else if (ready[i].data.ptr == &pace_timer) {
                if (read(pace_timer, &expirations, sizeof expirations) < 0) continue;
                if (series.active) continue_series();
            } else if (!connection->gone) {
                if (ready[i].events & EPOLLOUT) send_rest(connection);
                if (!connection->gone && ready[i].events & ~(uint32_t)EPOLLOUT) readable(connection);
            }
        }
        while (gone) {
            struct connection *last = gone;
            gone = last->next_gone;
            free(last->rest);
            free(last);
        }
    }
}
