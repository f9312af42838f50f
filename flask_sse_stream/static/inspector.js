// The inspector's page. It shows what the server sends each second, and asks it to publish and to end streams.
// Keys, names and data are somebody else's text: they are put into the page as text alone (textContent), shortened,
// and what cannot be seen in them is named.

const base = new URL(".", import.meta.url);
const $ = (id) => document.getElementById(id);
const LOOKS = 120; // as many as a chart has room for
const ROWS = 200;
const EVENTS = 100;
const CUT_AFTER = 2500; // milliseconds without a connection of which nothing is said
const SILENT_AFTER = 8000; // milliseconds without a word, after which a connection is taken for dead

// -- text and numbers --------------------------------------------------------------------------------------

// Controls, and what changes the direction of text or takes no room: U+202E in a key could turn a row around.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
const seen = (text) => String(text).replace(UNSEEN, (found) => `⟨${found.charCodeAt(0).toString(16).padStart(4, "0")}⟩`);
const line = (text, most = 120) => {
  const found = seen(text).replace(/[\n\t]/g, " ");
  return found.length > most ? `${found.slice(0, most)}…` : found;
};
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const number = (value) => (Math.abs(value) < 10 ? tenth : whole).format(value);
const brief = (value) => (Math.abs(value) < 10000 ? number(value) : short.format(value));
function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  for (; value >= 999.5 && place < units.length - 1; place++) value /= 1000;
  return `${place ? number(value) : whole.format(value)} ${units[place]}`;
}
function duration(seconds) {
  if (seconds < 1) return `${number(seconds * 1000)} ms`;
  if (seconds < 120) return `${number(seconds)} s`;
  if (seconds < 7200) return `${whole.format(seconds / 60)} min`;
  return seconds < 172800 ? `${whole.format(seconds / 3600)} h` : `${whole.format(seconds / 86400)} d`;
}
// What is measured in buckets is known by the upper end of one.
const lag = (seconds) => (!seconds ? "–" : seconds > 10 ? "> 10 s" : `< ${duration(seconds)}`);

function make(name, attributes = {}, ...content) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...content);
  return element;
}
function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// -- charts ------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
class Chart {
  constructor(title, value, show, { second, beside } = {}) {
    Object.assign(this, { title, value, show, second, beside });
    this.figure = make("p", { class: "figure" });
    this.under = make("p", { class: "beside" });
    this.top = make("span", { class: "top-value", "aria-hidden": "true" });
    const svg = document.createElementNS(SVG, "svg");
    for (const [key, text] of [["viewBox", `0 0 ${LOOKS - 1} 100`], ["preserveAspectRatio", "none"], ["aria-hidden", "true"]]) {
      svg.setAttribute(key, text);
    }
    this.paths = ["grid", "area", "second", "line"].map((name) => {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", name);
      svg.append(path);
      return path;
    });
    this.paths[0].setAttribute("d", `M0 12H${LOOKS}`);
    $("charts").append(make("article", { class: "chart" }, make("h2", {}, title), this.figure, this.under, this.top, svg));
  }

  draw(looks) {
    const values = looks.map((look) => this.value(look));
    const others = this.second ? looks.map((look) => this.second(look)) : [];
    const most = Math.max(...values, ...others, 0);
    const top = nice(most);
    const [, area, second, main] = this.paths;
    const path = this.path(values, top);
    main.setAttribute("d", path);
    area.setAttribute("d", path && `${path}L${LOOKS - 1} 100L${LOOKS - values.length} 100Z`);
    second.setAttribute("d", this.second ? this.path(others, top) : "");
    put(this.top, most ? this.show(top).replace(/^< /, "") : "");
    const last = looks.at(-1);
    put(this.figure, last ? this.show(this.value(last)) : "–");
    put(this.under, last && this.beside ? this.beside(last) : "");
  }

  path(values, top) {
    const start = LOOKS - values.length;
    return values.map((value, place) => `${place ? "L" : "M"}${start + place} ${(99 - (value / top) * 87).toFixed(1)}`).join("");
  }
}
function nice(value) {
  if (value <= 0) return 1;
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((factor) => factor * unit >= value) * unit;
}

const per = (show) => (value) => `${show(value)}/s`;
const charts = [
  new Chart("Streams", (look) => look.streams, whole.format, {
    beside: (look) => `+${brief(look.opened)} −${brief(look.closed)} a second${look.of_requests ? `, ${whole.format(look.of_requests)} of one request` : ""}`,
  }),
  new Chart("Events delivered", (look) => look.delivered, per(brief), {
    second: (look) => look.published,
    beside: (look) => [[look.published, "published"], [look.dropped, "dropped"], [look.replayed, "replayed"], [look.resets, "reset"]]
      .filter(([value]) => value).map(([value, what]) => `${brief(value)}/s ${what}`).join(", "),
  }),
  new Chart("Bytes sent", (look) => look.sent_bytes, per(bytes), {
    beside: (look) => (look.delivered ? `${bytes(look.sent_bytes / look.delivered)} a delivery` : ""),
  }),
  new Chart("Waiting in queues", (look) => look.waiting, brief, {
    beside: (look) => (look.oldest ? `the oldest for ${duration(look.oldest)}` : "nobody is behind"),
  }),
  new Chart("Lag, 99 %", (look) => look.lag_p99, lag, {
    beside: (look) => (look.lag_median ? `half of them ${lag(look.lag_median)}` : "from publish to socket or queue"),
  }),
];

// -- tables ------------------------------------------------------------------------------------------------

// Rows are kept from one second to the next, so that what has the keyboard's focus keeps it.
class Table {
  constructor(id, columns, order, name) {
    Object.assign(this, { columns, order, name, rows: new Map(), items: [] });
    this.body = $(id).tBodies[0];
    for (const column of columns) {
      const head = make("th", { scope: "col", class: column.class ?? "" });
      if (column.by) {
        const button = make("button", { type: "button" }, column.title);
        button.addEventListener("click", () => this.sort(column.title));
        head.append(button);
      } else head.append(make("span", { class: "unseen" }, column.title));
      column.head = head;
      $(id).tHead.rows[0].append(head);
    }
    this.mark();
  }

  sort(title) {
    const [by, descending] = this.order;
    const column = this.columns.find((one) => one.title === title);
    this.order = [title, by === title ? !descending : !column.text];
    this.mark();
    this.show(this.items);
  }

  mark() {
    for (const { title, head } of this.columns) {
      if (title === this.order[0]) head.setAttribute("aria-sort", this.order[1] ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
  }

  show(items) {
    this.items = items;
    const [title, descending] = this.order;
    const { by } = this.columns.find((one) => one.title === title);
    const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b) * (descending ? -1 : 1);
    const sorted = [...items].sort((a, b) => compare(by(a), by(b))); // the server's order among equals
    const before = this.rows;
    const focused = document.activeElement;
    this.rows = new Map();
    let place = this.body.firstElementChild;
    for (const item of sorted.slice(0, ROWS)) {
      const name = this.name(item);
      const row = before.get(name) ?? this.row();
      before.delete(name);
      this.rows.set(name, row);
      row.item = item;
      this.columns.forEach((column, index) => column.fill(row.cells[index], item));
      if (row === place) place = place.nextElementSibling;
      else this.body.insertBefore(row, place);
    }
    for (const row of before.values()) row.remove();
    if (focused !== document.activeElement && this.body.contains(focused)) focused.focus({ preventScroll: true });
  }

  row() {
    const row = make("tr");
    for (const column of this.columns) {
      const cell = make(column.row ? "th" : "td", { class: column.class ?? "" });
      column.make?.(cell, row);
      row.append(cell);
    }
    return row;
  }
}
const figure = (title, by, show, options = {}) => ({
  title, by, fill: (cell, item) => {
    put(cell, show(by(item)));
    if (options.warn) cell.classList.toggle("warn", options.warn(item));
  }, ...options,
});

const keys = new Table("keys", [
  {
    title: "Key", by: (item) => item.key, text: true, class: "name",
    make: (cell, row) => {
      const button = make("button", { type: "button", class: "open" }, make("bdi"));
      button.addEventListener("click", () => open(row.item.key, row.item.job));
      cell.append(button, make("span", { class: "tag", hidden: "" }, "job"));
    },
    fill: (cell, item) => {
      const [button, tag] = cell.children;
      put(button.firstChild, line(item.key));
      button.title = line(item.key, 255);
      tag.hidden = !item.job;
      const isOpen = chosen?.key === item.key && chosen.job === item.job;
      cell.parentNode.toggleAttribute("data-open", isOpen);
      if (isOpen) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    },
  },
  figure("Streams", (item) => item.streams, whole.format),
  figure("Processes", (item) => item.processes, whole.format, { class: "wide" }),
  figure("Waiting", (item) => item.waiting, whole.format),
  figure("Longest", (item) => item.longest, whole.format, { class: "wide" }),
  figure("Lag", (item) => item.lag, (value) => (value ? duration(value) : "–"), { warn: (item) => item.lag > 5 }),
], ["Streams", true], (item) => `${item.job} ${item.key}`);

const streams = new Table("streams", [
  {
    title: "User", by: (item) => item.user ?? "", text: true, class: "name", make: (cell) => cell.append(make("bdi")),
    fill: (cell, item) => {
      put(cell.firstChild, item.user === null ? "–" : line(item.user, 60));
      cell.title = `in ${line(item.process)}`;
    },
  },
  figure("Since", (item) => item.seconds, duration, { class: "wide" }),
  figure("Waiting", (item) => item.waiting, whole.format),
  figure("Sent", (item) => item.sent, bytes, { class: "wide" }),
  figure("Lag", (item) => item.lag, (value) => (value ? duration(value) : "–"), { class: "wide", warn: (item) => item.lag > 5 }),
  {
    title: "End it", class: "acts",
    make: (cell, row) => {
      for (const [text, kind, reconnect, why] of [
        ["Reconnect", "", true, "End this stream; its client comes back and gets what it missed"],
        ["End", "end", false, "End this stream for good: its client does not come back"],
      ]) {
        const button = make("button", { type: "button", class: `small ${kind}`, title: why }, text);
        button.addEventListener("click", () => end(row, reconnect));
        cell.append(button);
      }
    },
    fill: () => {},
  },
], ["Waiting", true], (item) => item.name);

const processes = new Table("processes", [
  {
    title: "Process", by: (item) => `${item.host}/${String(item.pid).padStart(9, "0")}`, text: true, class: "name",
    make: (cell) => cell.append(make("bdi"), ...["this one", "draining", "broker is away", "silent"].map((text, place) =>
      make("span", { class: place ? "tag warn" : "tag", hidden: "" }, text))),
    fill: (cell, item) => {
      const [name, own, draining, away, silent] = cell.children;
      put(name, line(`${item.host}/${item.pid}`, 60));
      cell.title = `${line(item.host)}, process ${item.pid}`;
      own.hidden = !item.own;
      draining.hidden = !item.draining;
      away.hidden = item.broker_up;
      silent.hidden = item.silent < 2;
    },
  },
  figure("Up", (item) => item.seconds, duration, { class: "wide" }),
  figure("Streams", (item) => item.streams, whole.format),
  figure("Events/s", (item) => item.delivered, brief),
  figure("Bytes/s", (item) => item.sent_bytes, bytes, { class: "wide" }),
  figure("Waiting", (item) => item.waiting, whole.format),
  figure("Lag 99 %", (item) => item.lag_p99, lag, { class: "wide" }),
], ["Process", false], (item) => item.process);

// -- what the server sends ---------------------------------------------------------------------------------

let looks = [];
let sample = null;
let paused = false;
let chosen = null; // the key that is open: {key, job}
let source = null;
let heard = 0;
let cut = 0; // when the connection was lost; 0: it is there
let again = 0;

function connect() {
  clearTimeout(again);
  source?.close();
  const url = new URL("events", base);
  if (chosen) {
    url.searchParams.set("key", chosen.key);
    if (chosen.job) url.searchParams.set("job", "1");
  }
  const mine = new EventSource(url);
  source = mine;
  heard = Date.now();
  mine.addEventListener("history", (event) => {
    const past = JSON.parse(event.data).totals;
    if (past.length >= looks.length) looks = past.slice(-LOOKS);
    alive();
  });
  mine.addEventListener("sample", (event) => {
    sample = JSON.parse(event.data);
    looks = [...looks, sample.totals].slice(-LOOKS);
    alive();
    if (!paused) showSample();
  });
  mine.addEventListener("key", (event) => {
    const found = JSON.parse(event.data);
    alive();
    if (mine === source) showKey(found);
  });
  mine.addEventListener("error", () => {
    cut ||= Date.now();
    // Anything but a stream, such as a proxy's 502 while the server starts anew: a browser would give up.
    if (mine.readyState === EventSource.CLOSED && mine === source) again = setTimeout(connect, 2000);
  });
}

function alive() {
  heard = Date.now();
  cut = 0;
  showState();
}

setInterval(() => {
  if (Date.now() - heard > SILENT_AFTER && !document.hidden) {
    cut ||= heard;
    connect();
  }
  showState();
}, 500);

function showState() {
  const isCut = cut && Date.now() - cut > CUT_AFTER;
  const state = isCut ? "cut" : looks.length ? "live" : "connecting";
  $("state").dataset.state = state;
  put($("state").lastChild, { cut: "Reconnecting", live: paused ? "Paused" : "Live", connecting: "Connecting" }[state]);
  const trouble = sample?.trouble ? `The broker does not answer, so other processes are not seen: ${line(sample.trouble, 300)}` : "";
  const lost = isCut ? "The connection to the server was cut, or you are no longer let in. What is shown is from before; it goes on by itself." : "";
  put($("notice"), lost || trouble);
  $("notice").hidden = !(lost || trouble);
}

const more = (count, what) => (count > 0 ? `and ${whole.format(count)} more ${what}` : "");

function showSample() {
  for (const chart of charts) chart.draw(looks);
  processes.show(sample.processes);
  put($("processes-count"), whole.format(sample.processes.length));
  put($("processes-more"), sample.shared
    ? "A process that has had no stream yet does not answer."
    : "SSE_BROKER_URL is memory://: this page sees the process that answers it alone.");
  showKeys();
}

function showKeys() {
  const wanted = $("filter").value.trim().toLowerCase();
  const found = (sample?.keys ?? []).filter((item) => item.key.toLowerCase().includes(wanted));
  keys.show(found);
  put($("keys-count"), wanted ? `${whole.format(found.length)} of ${whole.format(sample?.keys.length ?? 0)}` : whole.format(found.length));
  put($("keys-more"), more(sample?.more_keys ?? 0, "keys with fewer streams") || (sample && !found.length ? "No key has a stream." : ""));
}

function showKey(found) {
  if (paused && !found.fresh) return;
  if (found.streams) {
    streams.show(found.streams);
    put($("streams-count"), whole.format(found.streams.length + found.more_streams));
    put($("streams-more"), more(found.more_streams, "streams") || (found.streams.length ? "" : "Nobody listens."));
  }
  const list = $("events");
  list.dataset.empty = found.trouble ? `The broker does not answer: ${line(found.trouble, 300)}`
    : found.history ? "Nothing was published lately." : "No history is kept (SSE_HISTORY_SIZE is 0).";
  if (found.fresh) list.replaceChildren();
  const top = list.scrollTop;
  const height = list.scrollHeight;
  for (const event of found.events) list.prepend(eventItem(event, !found.fresh));
  while (list.children.length > EVENTS) list.lastChild.remove();
  if (top > 8) list.scrollTop = top + list.scrollHeight - height; // who reads further down is not moved
  if (list.children.length) list.tabIndex = 0;
  else list.removeAttribute("tabindex");
  list.setAttribute("aria-label", "Latest events, the newest first");
  put($("events-count"), list.children.length ? `${whole.format(list.children.length)}, the newest first` : "");
}

function eventItem(event, isNew) {
  const at = new Date(Date.now() - event.ago * 1000);
  const time = at.toLocaleTimeString("en-GB");
  const of = make("p", { class: "of" }, make("time", { datetime: at.toISOString() }, time));
  if (event.event) of.append(make("b", {}, make("bdi", {}, line(event.event))));
  for (const [is, text] of [[event.all, "to all"], [event.comment, "comment"]]) if (is) of.append(make("span", {}, text));
  of.append(make("span", {}, bytes(event.bytes)), make("span", { class: "id" }, make("bdi", {}, line(event.id, 60))));
  const data = seen(event.data) + (event.cut ? "…" : "");
  const item = make("li", isNew ? { class: "new" } : {}, of);
  if (data.length > 240) {
    const all = event.cut ? `the beginning of ${bytes(event.bytes)}` : "all of it";
    item.append(make("details", {}, make("summary", {}, `${data.slice(0, 160)}… `, make("small", {}, `(${all})`)), make("pre", {}, data)));
  } else item.append(make("pre", {}, data));
  return item;
}

// -- what can be done --------------------------------------------------------------------------------------

function open(key, job = false) {
  chosen = { key, job };
  history.replaceState(null, "", `#${new URLSearchParams({ key, ...(job ? { job: "1" } : {}) })}`);
  showChosen();
  connect();
  if (!job) $("key").value = key;
  $("detail-title").focus({ preventScroll: true });
  if (matchMedia("(max-width: 900px)").matches) $("detail").scrollIntoView({ block: "start" });
}

function showChosen() {
  put($("detail-title"), chosen ? `${chosen.job ? "Job" : "Key"} ${line(chosen.key)}` : "No key is open");
  $("detail-hint").hidden = Boolean(chosen);
  $("detail-body").hidden = $("leave").hidden = !chosen;
  for (const id of ["streams-count", "streams-more", "events-count", "ended"]) put($(id), "");
  $("events").replaceChildren();
  streams.show([]);
  showKeys();
}

$("leave").addEventListener("click", () => {
  chosen = null;
  history.replaceState(null, "", location.pathname + location.search);
  showChosen();
  connect();
  $("keys-title").focus({ preventScroll: true });
});

async function ask(what, body) {
  const response = await fetch(new URL(what, base), {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-SSE-Inspector": "1" },
    body: JSON.stringify(body),
  });
  const found = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(found.error ?? `it was answered ${response.status}`);
  return found;
}

function say(element, text, bad = false) {
  element.classList.toggle("bad", bad);
  put(element, text);
}

async function end(row, reconnect) {
  const { item } = row;
  for (const button of row.querySelectorAll("button")) button.disabled = true;
  try {
    await ask("end", { stream: item.name, reconnect });
    say($("ended"), reconnect ? "The stream was told to come back." : "The stream was told to end.");
    $("detail-title").focus({ preventScroll: true }); // its row will go
  } catch (error) {
    say($("ended"), `The stream was not ended: ${line(error.message, 300)}`, true);
    for (const button of row.querySelectorAll("button")) button.disabled = false;
  }
}

$("publish").addEventListener("submit", async (event) => {
  event.preventDefault();
  const kind = new FormData($("publish")).get("kind");
  try {
    const { id } = await ask("publish", {
      key: $("key").value, all: $("all").checked, event: $("event").value || null, data: $("data").value, json: kind === "json",
    });
    say($("published"), `Published as ${line(id, 60)}`);
  } catch (error) {
    say($("published"), `Not published: ${line(error.message, 300)}`, true);
  }
});
$("data").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("publish").requestSubmit();
});
$("all").addEventListener("change", () => {
  $("key").disabled = $("all").checked;
});
$("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("filter").value.trim();
  if (key) open(key);
});
$("filter").addEventListener("input", () => sample && showKeys());
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  showState();
  if (!paused && sample) {
    showSample();
    if (chosen) connect(); // for the events that came meanwhile
  }
});

const wanted = new URLSearchParams(location.hash.slice(1));
if (wanted.get("key")) {
  chosen = { key: wanted.get("key"), job: wanted.get("job") === "1" };
  if (!chosen.job) $("key").value = chosen.key;
}
showChosen();
for (const chart of charts) chart.draw(looks);
connect();
