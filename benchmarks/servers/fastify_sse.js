// The same application with @fastify/sse. It knows no keys: they are kept here.
'use strict';

const { PING_MILLISECONDS, Streams, serve } = require('./endpoint.js');

const streams = new Streams();
let application;
const app = require('fastify')({
    // Fastify's listener for a server that is made elsewhere.
    serverFactory(handler) {
        application = handler;
        return require('node:http').createServer(handler);
    },
});
app.register(require('@fastify/sse'), { heartbeatInterval: PING_MILLISECONDS, serializer: String });
app.after(() => {
    app.get('/stream', { sse: 'only' }, async (request, reply) => {
        const key = request.query.connectKey;
        reply.sse.keepAlive();
        reply.sse.sendHeaders();
        reply.raw.write(': open\n\n'); // until it has something to write, Node sends no head either
        streams.add(key, reply.sse);
        reply.sse.onClose(() => streams.remove(key, reply.sse));
    });
    app.get('/view', async () => 'an ordinary view\n');
});

app.ready().then(() => {
    serve(application, (key, id, text) => {
        for (const stream of streams.of(key)) stream.send({ id, event: 'tick', data: text }).catch(() => {});
    });
});
