// One page, one EventSource. The browser keeps the connection and the cursor (Last-Event-ID); this file only
// listens, draws, and counts what came. Nothing that was received is ever put into the page as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const reduced = matchMedia("(prefers-reduced-motion: reduce)");
const dark = matchMedia("(prefers-color-scheme: dark)");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// -- the connection ---------------------------------------------------------------------------------------

// A pool of this page's own, which the server can end without touching the others.
const TAB = document.body.dataset.tab;
// EventSource answers a refusal by giving up, and then it is the page's turn to try again.
const REOPEN_AFTER = 3000;

const connection = {
  source: null,
  room: null,
  // The id of the latest event. An EventSource keeps it for its own reconnects, but a new one has to be told.
  cursor: "",
  // From a (re)connection until the first number that was made after it, everything comes out of the log.
  replaying: true,
  openedAt: 0,
  // By how much the page's clock is ahead of the server's: the least that was seen, so with the least delay in it.
  offset: performance.now() - Number(document.body.dataset.now) * 1000,
  reopening: null,
};

function connect(room) {
  connection.source?.close();
  clearTimeout(connection.reopening);
  connection.room = room;
  showState("connecting");

  const keys = ["machine", "ticks", "listeners", `room-${room}`, `tab-${TAB}`];
  const query = new URLSearchParams(keys.map((key) => ["connectKey", key]));
  if (connection.cursor) query.set("lastEventId", connection.cursor);
  const source = (connection.source = new EventSource(`/stream?${query}`));

  source.onopen = () => {
    connection.openedAt = performance.now();
    connection.replaying = true;
    showState("live");
    // Only now: what is said from here on comes through the stream, so nothing can fall between the two.
    if (!talk.complete) talk.load(room);
  };
  source.onerror = () => {
    showState("cut");
    if (source.readyState === EventSource.CLOSED) {
      connection.reopening = setTimeout(() => connect(connection.room), REOPEN_AFTER);
    }
  };

  const listen = (name, handle) =>
    source.addEventListener(name, (event) => {
      connection.cursor = event.lastEventId;
      handle(JSON.parse(event.data), event.lastEventId);
    });
  listen("machine", showSample);
  listen("tick", showTick);
  listen("said", showMessage);
  listen("listeners", showListeners);
  // The server's log does not reach back to where we were (it was restarted, or we were away for too long):
  // what is on the page may have holes, so begin as if the page had just been opened.
  listen("stream-reset", () => {
    notify("The server’s log no longer reaches back to where this page was, so the page has started afresh.");
    strip.reset();
    charts.reset();
    talk.reset();
    connection.cursor = "";
    connect(connection.room);
  });
}

function showState(state) {
  document.body.dataset.state = state;
  $("cut").disabled = state !== "live";
  $("state").textContent = { connecting: "Connecting", live: "Live", cut: "Reconnecting" }[state];
  strip.setConnected(state === "live");
}

let noticeEnds = null;
function notify(text) {
  $("notice").textContent = text;
  $("notice").hidden = false;
  clearTimeout(noticeEnds);
  noticeEnds = setTimeout(() => ($("notice").hidden = true), 10_000);
}

// -- the charts -------------------------------------------------------------------------------------------

const SECONDS = 120;

function bytes(value) {
  const units = ["B", "kB", "MB", "GB"];
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return [value < 9.95 && unit ? value.toFixed(1) : value.toFixed(0), units[unit]];
}

// 1, 2 or 5 times a power of ten: a scale that is easy to read and does not change with every sample.
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value);
}

// All charts share one time axis, and pointing at a moment in one of them points at it in all.
const charts = {
  at: [],
  plots: [],
  latest: null,

  add(id, { series, most, label, show }) {
    const holder = $(`${id}-plot`);
    const plot = {
      rows: series.map(() => []),
      pick: series.map(({ field }) => field),
      show,
      when: holder.parentElement.querySelector(".when"),
    };
    const axis = { stroke: () => colour("soft"), font: "12px system-ui, sans-serif", ticks: { show: false } };
    plot.uplot = new uPlot(
      {
        width: holder.clientWidth,
        height: holder.clientHeight,
        padding: [8, 16, 0, 0],
        legend: { show: false },
        cursor: { y: false, drag: { x: false, y: false }, sync: { key: "machine" }, points: { size: 7 } },
        scales: {
          x: { range: () => [charts.now() - SECONDS, charts.now()] },
          y: { range: (_, low, high) => [0, most ?? roundUp(Math.max(2000, high ?? 0))] },
        },
        axes: [
          {
            ...axis,
            grid: { show: false },
            size: 26,
            // Seconds before now: who looks at live charts asks "how long ago", not "at what time".
            splits: (uplot) => (uplot.width < 280 ? [60, 0] : [90, 60, 30, 0]).map((ago) => charts.now() - ago),
            values: (_, splits) => splits.map((at) => (at === charts.now() ? "now" : `−${Math.round(charts.now() - at)} s`)),
          },
          {
            ...axis,
            grid: { stroke: () => colour("grid"), width: 1 },
            size: 58,
            splits: (_u, _i, _low, high) => [0, high / 2, high],
            values: (_, splits) => splits.map(label),
          },
        ],
        series: [
          {},
          ...series.map(({ paint, filled, dash }) => ({
            stroke: () => colour(paint),
            fill: filled ? () => `${colour(paint)}22` : undefined,
            width: 2,
            dash,
            points: { show: false },
          })),
        ],
        hooks: { setCursor: [() => charts.read(plot)] },
      },
      [[], ...plot.rows],
      holder,
    );
    new ResizeObserver(() =>
      plot.uplot.setSize({ width: holder.clientWidth, height: holder.clientHeight }),
    ).observe(holder);
    this.plots.push(plot);
  },

  now() {
    return this.at.at(-1) ?? 0;
  },

  push(sample) {
    // While nobody listens nothing is measured; null keeps the line from being drawn across such a hole.
    if (this.at.length && sample.at - this.now() > 2.5) this.append(this.now() + 1, null);
    this.append(sample.at, sample);
    while (this.at[0] < sample.at - SECONDS - 2) {
      this.at.shift();
      for (const plot of this.plots) plot.rows.forEach((row) => row.shift());
    }
    this.latest = sample;
    this.later();
  },

  append(at, sample) {
    this.at.push(at);
    for (const plot of this.plots) plot.rows.forEach((row, i) => row.push(sample ? sample[plot.pick[i]] : null));
  },

  // A replay brings many samples at once, which are drawn once.
  later() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      for (const plot of this.plots) {
        plot.uplot.setData([this.at, ...plot.rows]);
        this.read(plot);
      }
    });
  },

  // The figures above a chart: those of the moment that is pointed at, or else the latest.
  read(plot) {
    if (!this.latest) return;
    const index = plot.uplot.cursor.idx;
    const pointed = index != null && plot.rows[0][index] != null;
    plot.when.hidden = !pointed;
    if (pointed) {
      plot.when.textContent = `${Math.round(this.now() - this.at[index])} s ago`;
      plot.show(plot.rows.map((row) => row[index]));
    } else {
      plot.show(plot.pick.map((field) => this.latest[field]));
    }
  },

  reset() {
    this.at.length = 0;
    for (const plot of this.plots) plot.rows.forEach((row) => (row.length = 0));
  },
};

function showSample(sample) {
  charts.push(sample);
  const used = (sample.memory_used / 2 ** 30).toFixed(1);
  const total = (sample.memory_total / 2 ** 30).toFixed(1);
  $("memory-detail").textContent = `${used} of ${total} GiB`;
}

function drawCharts() {
  const percent = (value) => `${value} %`;
  const put = (id) => ([value]) => ($(id).textContent = value.toFixed(value < 99.95 ? 1 : 0));
  charts.add("cpu", { series: [{ field: "cpu", paint: "live", filled: true }], most: 100, label: percent, show: put("cpu") });
  charts.add("memory", {
    series: [{ field: "memory", paint: "memory", filled: true }],
    most: 100,
    label: percent,
    show: put("memory"),
  });
  charts.add("network", {
    // Dashed, since on one machine the two are often equal.
    series: [{ field: "received", paint: "live", filled: true }, { field: "sent", paint: "sent", dash: [5, 4] }],
    label: (value) => bytes(value).join(" "),
    show: (values) =>
      ["received", "sent"].forEach((id, i) => {
        const [value, unit] = bytes(values[i]);
        $(id).textContent = value;
        $(`${id}-unit`).textContent = `${unit}/s`;
      }),
  });
  // The canvas does not notice that its colours have changed.
  dark.addEventListener("change", () => charts.plots.forEach((plot) => plot.uplot.redraw(false, true)));
}

// -- the strip of numbers: nothing lost, nothing twice ------------------------------------------------------

const CELLS = 60;
const TICK_EVERY = 250;

// Each number has its fixed place, as on a radar: the newest goes round and nothing else moves.
const strip = {
  cells: [],
  highest: 0,
  guessed: 0, // while cut off: the highest number that must have been sent by now
  guessing: null,
  counts: { received: 0, replayed: 0, lost: 0, doubled: 0 },

  build() {
    for (let i = 0; i < CELLS; i += 1) this.cells.push($("strip").appendChild(document.createElement("i")));
    this.showCounts();
  },

  paint(number, kind) {
    const cell = this.cells[number % CELLS];
    cell.className = kind;
    cell.textContent = number;
    // The next two places are cleared, so that the eye finds where the newest is.
    for (const ahead of [1, 2]) {
      const next = this.cells[(number + ahead) % CELLS];
      if (Number(next.textContent) < number) {
        next.className = "";
        next.textContent = "";
      }
    }
    this.newest?.classList.remove("newest");
    if (kind === "live") {
      this.newest = cell;
      cell.classList.add("newest");
    }
  },

  take(number, kind) {
    if (kind !== "before") {
      if (number <= this.highest) {
        this.counts.doubled += 1;
        return this.showCounts();
      }
      if (this.highest) {
        // Numbers come in order, so what was jumped over will not come any more.
        for (let gone = this.highest + 1; gone < number; gone += 1) {
          this.counts.lost += 1;
          this.paint(gone, "lost");
        }
      }
      this.counts.received += 1;
      if (kind === "replayed") this.counts.replayed += 1;
      this.highest = number;
    }
    this.paint(number, kind);
    this.showCounts();
  },

  // The server goes on counting while we hear nothing, at a pace that is known: draw the numbers we miss.
  setConnected(connected) {
    if (connected) {
      clearInterval(this.guessing);
      this.guessing = null;
    }
    if (connected || this.guessing || !this.highest) return;
    this.guessed = this.highest;
    this.missedBefore = this.counts.replayed;
    const begun = performance.now();
    this.guessing = setInterval(() => {
      const ago = Math.floor((performance.now() - begun) / TICK_EVERY);
      const due = this.highest + Math.min(ago, CELLS - 3); // no further than once round
      while (this.guessed < due) this.paint((this.guessed += 1), "missed");
    }, 100);
  },

  showCounts() {
    for (const [name, count] of Object.entries(this.counts)) {
      const field = $(`${name}-count`);
      field.textContent = count;
      field.parentElement.classList.toggle("bad", count > 0 && (name === "lost" || name === "doubled"));
    }
  },

  reset() {
    this.highest = 0;
    for (const name of Object.keys(this.counts)) this.counts[name] = 0;
    this.showCounts();
    for (const cell of this.cells) cell.className = cell.textContent = "";
  },
};

function showTick({ number, at }) {
  const now = performance.now();
  connection.offset = Math.min(connection.offset, now - at * 1000);
  const made = at * 1000 + connection.offset;
  if (connection.replaying && made >= connection.openedAt) {
    connection.replaying = false;
    const { received, replayed, lost, doubled } = strip.counts;
    if (strip.missedBefore !== undefined && strip.missedBefore < replayed) {
      $("replay-says").textContent =
        `Connected again: ${replayed - strip.missedBefore} of ${received} numbers were replayed, ${lost} lost, ${doubled} doubled.`;
    }
    strip.missedBefore = undefined;
  }
  // What was said before the page was there is nothing that it missed.
  strip.take(number, !connection.replaying ? "live" : strip.highest ? "replayed" : "before");
}

$("cut").addEventListener("click", async () => {
  $("cut").disabled = true;
  try {
    const answer = await fetch(`/cut/${TAB}`, { method: "POST" });
    if (!answer.ok) throw new Error();
  } catch {
    notify("The server could not be asked to cut the connection.");
    $("cut").disabled = document.body.dataset.state !== "live";
  }
});

// -- the chat ---------------------------------------------------------------------------------------------

const clockTime = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });

const talk = {
  list: $("talk"),
  messages: new Map(), // by id
  complete: false,
  last: null,

  // What was said before comes by an ordinary request, what is said now through the stream; some comes both ways.
  async load(room) {
    this.complete = true;
    try {
      const answer = await fetch(`/chat/${room}`);
      if (!answer.ok) throw new Error();
      const earlier = await answer.json();
      if (room !== connection.room) return; // gone on to another room meanwhile
      const since = this.messages;
      this.reset();
      this.complete = true;
      for (const message of earlier) this.add(message.id, message, false);
      for (const [id, { message, missed }] of since) this.add(id, message, missed);
    } catch {
      this.complete = false; // the next connection tries again
    }
  },

  add(id, message, missed) {
    if (this.messages.has(id)) return;
    this.messages.set(id, { message, missed });
    const nearEnd = this.list.scrollHeight - this.list.scrollTop - this.list.clientHeight < 60;
    const at = new Date(message.at * 1000);
    const item = document.createElement("li");
    const who = item.appendChild(document.createElement("div"));
    who.className = "who";
    who.appendChild(document.createElement("b")).textContent = message.name;
    const time = who.appendChild(document.createElement("time"));
    time.dateTime = at.toISOString();
    time.textContent = clockTime.format(at);
    item.appendChild(document.createElement("p")).textContent = message.text;
    item.classList.toggle("mine", message.name === $("name").value.trim());
    item.classList.toggle("missed", missed);
    item.classList.toggle("again", this.last?.name === message.name && message.at - this.last.at < 120);
    this.list.append(item);
    this.last = message;
    $("empty").hidden = true;
    // Who has scrolled up is reading; do not pull the text away.
    if (nearEnd) this.list.scrollTo({ top: this.list.scrollHeight });
  },

  reset() {
    this.list.replaceChildren();
    this.messages = new Map();
    this.complete = false;
    this.last = null;
    $("empty").hidden = false;
  },
};

function showMessage(message, id) {
  talk.add(id, message, connection.replaying && strip.highest > 0);
}

for (const radio of document.querySelectorAll("[name=room]")) {
  radio.addEventListener("change", () => {
    talk.reset();
    connect(radio.value);
  });
}

$("say").addEventListener("submit", async (event) => {
  event.preventDefault();
  const error = $("say-error");
  const name = $("name").value.trim();
  const text = $("text").value.trim();
  if (!name || !text) return;
  localStorage.setItem("name", name);
  try {
    // The message is not drawn here: it comes back through the stream, as it does to everybody else.
    const answer = await fetch(`/chat/${connection.room}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ name, text }),
    });
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    $("text").value = "";
    error.hidden = true;
  } catch (problem) {
    error.textContent = `Not sent: ${problem.message}. Your text is still there; try again.`;
    error.hidden = false;
  }
  $("text").focus();
});

function someName() {
  const pick = (words) => words[Math.floor(Math.random() * words.length)];
  const animals = ["Otter", "Heron", "Fox", "Owl", "Hare", "Wren", "Lynx", "Newt", "Robin", "Badger"];
  return `${pick(["Quiet", "Swift", "Kind", "Brave", "Merry", "Calm", "Keen", "Sunny"])} ${pick(animals)}`;
}

// -- the listeners ------------------------------------------------------------------------------------------

function showListeners({ total, pools }) {
  $("listeners-total").textContent = total;
  $("listeners-word").textContent = total === 1 ? "stream open" : "streams open";
  for (const field of document.querySelectorAll("[data-count]")) {
    const count = pools[field.dataset.count] ?? 0;
    field.textContent = count;
    const dots = field.parentElement.querySelector(".dots");
    if (dots) {
      while (dots.childElementCount > count) dots.lastChild.remove();
      while (dots.childElementCount < Math.min(count, 100)) dots.append(document.createElement("i"));
    } else {
      field.hidden = count === 0; // the number beside a room's name
    }
  }
}

// -- the countdown ------------------------------------------------------------------------------------------

const countdown = {
  source: null,

  start(from) {
    this.source?.close();
    this.show(from, from, "ready");
    $("start").textContent = "Start again";
    const source = (this.source = new EventSource(`/countdown?from=${from}`));
    let over = false;
    source.addEventListener("left", (event) => {
      const { left } = JSON.parse(event.data);
      this.show(left, from, "running");
      $("countdown-says").textContent = "A generator view, streamed to you alone.";
    });
    source.addEventListener("close", () => {
      over = true;
      this.phase("over");
      $("countdown-says").textContent = "Over. The browser does not know yet, and will ask for more …";
    });
    // No call of close() here: the browser reconnects once, is answered 204 and stops for good by itself.
    source.addEventListener("error", () => {
      if (source.readyState !== EventSource.CLOSED) {
        if (!over) $("countdown-says").textContent = "Interrupted. The browser will go on where it was …";
      } else if (over) {
        $("countdown-says").textContent = "Over. The browser asked for more, was answered 204 and has stopped.";
      } else {
        this.phase("ready");
        $("countdown-says").textContent = "The server refused; is the number between 1 and 60?";
      }
    });
  },

  show(left, from, phase) {
    this.phase(phase);
    $("left").textContent = left;
    // The ring runs down to where the next number will be, in the second that this one lasts.
    const ahead = phase === "running" && !reduced.matches ? Math.max(0, left - 1) : left;
    $("ring").style.strokeDashoffset = 1 - ahead / from;
  },

  phase(phase) {
    $("left").closest(".countdown").dataset.phase = phase;
  },
};

$("countdown").addEventListener("submit", (event) => {
  event.preventDefault();
  countdown.start($("from").valueAsNumber);
});
$("from").addEventListener("input", () => {
  if (!countdown.source && $("from").validity.valid) $("left").textContent = $("from").value;
});

// -- off we go ----------------------------------------------------------------------------------------------

$("name").value = localStorage.getItem("name") ?? someName();
strip.build();
drawCharts();
connect(document.querySelector("[name=room]:checked").value);
