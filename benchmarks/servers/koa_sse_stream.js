// The same application with koa-sse-stream, an ancestor of flask_sse_stream. It knows no keys: they are kept here.
'use strict';

const Koa = require('koa');
const sse = require('koa-sse-stream');
const { PING_MILLISECONDS, Streams, serve } = require('./endpoint.js');

const streams = new Streams();
const app = new Koa();
app.silent = true;
app.use(sse({ maxClients: 20000, pingInterval: PING_MILLISECONDS, matchQuery: 'connectKey' }));
app.use(async (ctx) => {
    if (!ctx.sse) {
        ctx.body = 'an ordinary view\n';
        return;
    }
    const key = ctx.query.connectKey;
    streams.add(key, ctx.sse);
    ctx.sse.on('close', () => streams.remove(key, ctx.sse));
});

serve(app.callback(), (key, id, text) => {
    for (const stream of streams.of(key)) stream.send({ id, event: 'tick', data: text });
});
