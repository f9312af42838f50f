// A client of streams: one connection for all tabs of an origin, which goes on after reloads, errors and silence.
// What its options mean is in sse.d.ts. Who needs none of this is served as well by an EventSource.
//
// Of the tabs with the same stream one leads, the holder of a Web Lock: it reads the stream, and says on a
// BroadcastChannel what it read. Each tab knows its place in the order of events and takes what comes after that. One
// that finds a gap, or comes with a place from before, asks the leader, which has the latest events; what the leader
// does not know, the tab reads from the server by itself until it has caught up.

// The format of the HTML standard, section 9.2.6: gives a function for bytes that are cut anywhere, which calls
// take() for every block that has ended, and for each retry at once.
export function parser(take) {
  const utf8 = new TextDecoder(); // drops a BOM, and replaces what is no UTF-8
  let rest = "";
  let cut; // after a CR, whose LF may come with the next bytes
  let block = {};
  return (bytes) => {
    const text = utf8.decode(bytes, { stream: true });
    if (!text) return;
    const lines = (rest + text.slice(cut && text[0] == "\n")).split(/\r\n?|\n/);
    cut = text.endsWith("\r");
    rest = lines.pop();
    for (const line of lines) {
      const [, name, value = ""] = /^([^:]*)(?:: ?(.*))?$/s.exec(line);
      if (!line) {
        take(block);
        block = {};
      } else if (name == "data") block.data = "data" in block ? block.data + "\n" + value : value;
      else if (name == "event" || (name == "id" && !value.includes("\0"))) block[name] = value;
      else if (name == "retry" && /^\d+$/.test(value)) take({ retry: +value });
      else if (!name) block.comment = value;
    }
  };
}

export function connect(url, options = {}) {
  const { keys = [], keyParam = "connectKey", timeout = 30000, shared = true, renew } = options;
  const controller = () => new AbortController();
  // A place is [life of the log, number in it, events since which have none, but an id of the user's own].
  const after = (a, b) => !b || a[0] != b[0] || (a[1] - b[1] || a[2] - b[2]) > 0;
  let target = new URL(url, location);
  for (const key of keys) target.searchParams.append(keyParam, key);
  const group = "sse:" + (options.name ?? target);
  const me = Math.random();
  const closed = controller();
  let left; // aborted when this tab leaves the others
  let reading; // what read() goes by; another value stops it
  let cut = () => {}; // ends its request
  let wake = cut; // ends its pause
  let channel;
  let overdue; // the timer of what the leader should have said
  let follows; // whether it takes what the leader says
  let goal; // the leader's place, up to which this tab reads by itself
  let cursor; // the id to come back with
  let place; // and its place
  let latest = []; // events for tabs that have missed them
  let retry = 1000;
  let storage;

  // Events

  const source = Object.assign(new EventTarget(), { state: "connecting", leader: false, on, close: () => end(0) });

  function on(name, listener, json = options.json) {
    const call = (event) => {
      let { data } = event;
      try {
        if (json) data = JSON.parse(data);
      } catch {} // no JSON: as it is
      listener(data, event);
    };
    source.addEventListener(name, call);
    return () => source.removeEventListener(name, call);
  }

  function take(message) {
    if (message.place) {
      if (!after(message.place, place)) return;
      ({ place, id: cursor } = message);
      latest = [...latest.slice(-127), message];
      try {
        storage.setItem(group, JSON.stringify([cursor, place]));
      } catch {}
    }
    const { event, data } = message;
    if (data != null) source.dispatchEvent(new MessageEvent(event || "message", { data, lastEventId: cursor }));
  }

  function say(state, status) {
    if (source.state == state) return;
    source.state = state;
    if (source.leader) post({ state });
    queueMicrotask(() => options.onState?.(state, status)); // what it throws is its own
  }

  // The connection

  async function read() {
    const turn = (reading = {});
    let failures = 0;
    let stale; // the address or its headers have to be renewed
    let renewed;
    const hear = ({ id, data, event, comment, ...block }) => {
      if (reading != turn) return;
      retry = block.retry ?? retry;
      stale ||= renew && event == "stream-expired";
      const message = { id, data, event };
      if (id != null) {
        const [, life, number] = /^([0-9a-f]{12})-(\d+)$/.exec(id) ?? [];
        const [a, b, c] = place ?? ["", 0, 0];
        message.place = life ? [life, +number, 0] : [a, b, c + 1];
      }
      if (source.leader && (id ?? data) != null) post(message);
      take(message);
      // A ping is behind everything that was missed.
      if (goal && (comment == "ping" || !after(goal.place, place))) {
        take(goal);
        goal = 0;
        ask();
      }
    };
    while (reading == turn) {
      const request = controller();
      const { signal } = request;
      const abort = (cut = () => request.abort());
      let wait;
      let watch;
      const alive = () => {
        clearTimeout(watch);
        if (timeout) watch = setTimeout(abort, timeout);
      };
      say("connecting");
      try {
        if (stale) {
          const fresh = await renew();
          if (fresh === null) return reading == turn && end(401);
          if (fresh) target = new URL(fresh, location);
          stale = 0;
          renewed = 1;
        }
        const headers = { Accept: "text/event-stream", ...(await options.headers?.()) };
        // A header's characters stand for bytes, which are those of UTF-8 here.
        if (cursor) headers["Last-Event-ID"] = unescape(encodeURIComponent(cursor));
        alive();
        const response = await fetch(target, { headers, signal, cache: "no-store", credentials: options.credentials });
        const { status } = response;
        if (status == 200) {
          if (!/event-stream/.test(response.headers.get("Content-Type"))) throw 0;
          failures = renewed = 0;
          say("open");
          const feed = parser(hear);
          const body = response.body.getReader();
          for (let part; !(part = await body.read()).done; feed(part.value)) alive();
          wait = retry;
        } else if ([401, 403].includes(status) && renew && !renewed) {
          stale = 1;
          wait = 0;
        } else if (status < 500 && status != 429) return reading == turn && end(status);
      } catch {}
      clearTimeout(watch);
      abort();
      wait ??= Math.min(30000 + retry, (500 + retry) * 2 ** failures++) * (1 - Math.random() / 2);
      // With more milliseconds, a timer fires at once.
      if (reading == turn) await new Promise((done) => setTimeout((wake = done), Math.min(wait, 2 ** 31 - 1)));
    }
  }

  function stop() {
    reading = goal = 0;
    cut();
    wake();
  }

  // The other tabs

  function post(message) {
    channel?.postMessage({ prev: place, ...message });
  }

  function join() {
    if (left) return;
    left = controller();
    if (shared && navigator.locks) {
      channel = new BroadcastChannel(group);
      channel.onmessage = ({ data }) => listen(data);
      stand();
      ask();
    } else lead();
  }

  function leave() {
    left?.abort();
    left = null;
    stop();
    clearTimeout(overdue);
    channel?.close();
    channel = null;
    source.leader = follows = false;
  }

  function end(status) {
    leave();
    closed.abort();
    if (status == 204) storage?.removeItem(group);
    say("closed", status);
  }

  // Lead as soon as no tab does; or at once, since the one that does is silent.
  function stand(steal) {
    const { signal } = left;
    navigator.locks.request(group, steal ? { steal } : { signal }, lead).catch((error) => {
      if (signal.aborted) return;
      source.leader = false;
      stop();
      if (error.name != "AbortError") return lead(); // there are no locks in this context
      // Another tab has taken over. If this one had stolen too, its first request still waits.
      if (!steal) stand();
      ask();
    });
  }

  function lead() {
    stop();
    clearTimeout(overdue);
    source.leader = true;
    post({ state: source.state });
    return read();
  }

  function expect(share, otherwise) {
    clearTimeout(overdue);
    overdue = setTimeout(otherwise, share * (timeout || 30000));
  }

  function ask() {
    post({ ask: me, place });
    expect(0.25, () => stand(true));
  }

  function listen(message) {
    const { ask: asking, state, prev, to, list } = message;
    if (source.leader && asking) {
      const asked = message.place;
      const had = (one) => one.place[0] == asked[0] && !after(one.place, asked);
      const last = asked && place ? latest.findLastIndex(had) : 128;
      post({ to: asking, state: source.state, place, id: cursor, list: last < 0 ? null : latest.slice(last + 1) });
    }
    if (source.leader || asking || (to && to != me)) return;
    expect(1, ask);
    if (state) say(state);
    if (list) {
      stop();
      list.forEach(take);
      if (!place) take(message);
      follows = true;
    } else if (to) {
      goal = message;
      if (!reading) read();
    } else if (follows) {
      follows = prev ? !after(prev, place) : !place || !message.place;
      if (follows) take(message);
      else ask();
    }
  }

  try {
    storage = "storage" in options ? options.storage : sessionStorage;
    [cursor, place] = JSON.parse(storage.getItem(group));
    latest = [{ id: cursor, place }];
  } catch {} // no storage, or nothing in it
  for (const name in options.events) on(name, options.events[name]);
  for (const name of ["Reset", "Expired", "Dropped"]) {
    const listener = options["on" + name];
    if (listener) on("stream-" + name.toLowerCase(), listener, true);
  }
  // Who is frozen, or kept for going back, must neither lead nor wait for it.
  const actions = { pagehide: leave, freeze: leave, pageshow: join, resume: join, online: () => wake() };
  for (const name in actions) addEventListener(name, actions[name], { signal: closed.signal, capture: true });
  join();
  return source;
}
