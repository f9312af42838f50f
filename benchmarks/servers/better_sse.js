// The same application with better-sse: a channel for each key, on Node's own http.
'use strict';

const { createChannel, createSession } = require('better-sse');
const { PING_MILLISECONDS, serve } = require('./endpoint.js');

const channels = new Map();

async function application(request, response) {
    const url = new URL(request.url, 'http://127.0.0.1');
    if (url.pathname !== '/stream') {
        response.end('an ordinary view\n');
        return;
    }
    const key = url.searchParams.get('connectKey');
    const session = await createSession(request, response, {
        retry: 3000,
        keepAlive: PING_MILLISECONDS,
        serializer: String,
    });
    if (!channels.has(key)) channels.set(key, createChannel());
    channels.get(key).register(session);
}

serve(application, (key, id, text) => channels.get(key)?.broadcast(text, 'tick', { eventId: id }));
