// The same application with egg-sse, an ancestor of flask_sse_stream, in one process of Egg.
'use strict';

const fs = require('node:fs');
const path = require('node:path');
const egg = require('egg');
const { PING_MILLISECONDS, serve } = require('./endpoint.js');

// Egg wants a directory with files of these names.
const directory = process.env.BENCHMARK_SCRATCH;
const plugin = path.dirname(require.resolve('egg-sse/package.json'));
const config = {
    keys: 'bench',
    sse: { maxClients: 20000, pingInterval: PING_MILLISECONDS },
    security: { csrf: { enable: false } },
    logger: { level: 'NONE', consoleLevel: 'NONE', disableConsoleAfterReady: false },
    middleware: ['open'],
};
const files = {
    'package.json': JSON.stringify({ name: 'benchmark', egg: {} }),
    'config/plugin.js': `exports.sse = { enable: true, path: ${JSON.stringify(plugin)} };`,
    'config/config.default.js': `module.exports = () => (${JSON.stringify(config)});`,
    'app/router.js': `module.exports = (app) => app.router.get('/view', (ctx) => { ctx.body = 'an ordinary view\\n'; });`,
    // It sends nothing, not even the response's head, before the first event.
    'app/middleware/open.js': `module.exports = () => async (ctx, next) => {
        await next();
        if (ctx.sse) ctx.sse.send(':open');
    };`,
};
for (const [name, text] of Object.entries(files)) {
    fs.mkdirSync(path.join(directory, path.dirname(name)), { recursive: true });
    fs.writeFileSync(path.join(directory, name), text);
}

(egg.start ?? egg.default.start)({ baseDir: directory, mode: 'single' }).then((app) => {
    serve(app.callback(), (key, id, text) => app.sse.publish(key, { id, event: 'tick', data: text }));
});
