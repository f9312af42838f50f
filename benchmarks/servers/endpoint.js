// What the servers on Node have beside their streams; endpoint.py says what that is, and does the same.
'use strict';

const http = require('node:http');

const PING_MILLISECONDS = Number(process.env.BENCHMARK_PING_SECONDS || 10) * 1000;

function keyNames(keys) {
    return keys ? Array.from({ length: keys }, (_, number) => `bench-${number}`) : ['bench'];
}

let identifier = 0;

async function publishEvents(query, publish) {
    const events = Number(query.get('events') ?? 1);
    const interval = BigInt(Math.round(Number(query.get('interval') ?? 0) * 1e9));
    const size = Number(query.get('size') ?? 100);
    const keys = keyNames(Number(query.get('keys') ?? 0));
    const started = [];
    const returned = [];
    let due = process.hrtime.bigint();
    for (let number = 0; number < events; number++) {
        if (interval) {
            due += interval;
            const wait = Number(due - process.hrtime.bigint()) / 1e6;
            await new Promise((resolve) => setTimeout(resolve, Math.max(0, wait)));
        }
        started.push(Number(process.hrtime.bigint()));
        const text = `${number} ${started[number]} `.padEnd(size, 'x');
        for (const key of keys) publish(key, String(++identifier), text);
        returned.push(Number(process.hrtime.bigint()));
    }
    return JSON.stringify({ started, returned });
}

// Serves "application", a listener of Node's requests, on the socket that the benchmark passed on.
// "publish" takes a key, an id and the text of one event.
function serve(application, publish) {
    const server = http.createServer((request, response) => {
        if (request.method !== 'POST') {
            application(request, response);
            return;
        }
        const query = new URL(request.url, 'http://127.0.0.1').searchParams;
        publishEvents(query, publish).then((body) => {
            response.writeHead(200, { 'Content-Type': 'application/json', 'Content-Length': body.length });
            response.end(body);
        });
    });
    server.listen({ fd: Number(process.argv[2]), backlog: 4096 });
}

// The streams of each key, for those that leave this to the application.
class Streams {
    #ofKey = new Map();

    add(key, stream) {
        if (!this.#ofKey.has(key)) this.#ofKey.set(key, new Set());
        this.#ofKey.get(key).add(stream);
    }

    remove(key, stream) {
        this.#ofKey.get(key)?.delete(stream);
    }

    of(key) {
        return this.#ofKey.get(key) ?? [];
    }
}

module.exports = { PING_MILLISECONDS, Streams, serve };
