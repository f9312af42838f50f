// The page's address names its tasks (?task=...&task=...), so it can be reloaded, kept and passed on. One EventSource
// listens to all of them. Nothing that was received is ever put into the page as HTML.
"use strict";

const $ = (selector, within = document) => within.querySelector(selector);
const MOST = 8; // tasks on one page; the oldest make room

const cards = new Map(); // the element of each task, by its id
let source = null;

const number = (value) => value.toLocaleString("en");
const over = (card) => ["succeeded", "failed", "revoked"].includes(card.dataset.state);

// What is said aloud by a screen reader.
function say(text) {
  $("#says").textContent = text;
}

function complain(text) {
  $("#problem").textContent = text;
  $("#problem").hidden = !text;
}

function add(task) {
  const card = $("#card").content.cloneNode(true).firstElementChild;
  $("h2", card).textContent = "Task " + task.slice(0, 8);
  $("h2", card).id = "title-" + task;
  $("progress", card).setAttribute("aria-labelledby", "title-" + task);
  $("button", card).setAttribute("aria-describedby", "title-" + task);
  $("button", card).addEventListener("click", () => stop(task));
  cards.set(task, card);
  $("#tasks").prepend(card);
  while (cards.size > MOST) {
    const [oldest, gone] = cards.entries().next().value;
    cards.delete(oldest);
    gone.remove();
  }
}

// Each event has all of the state, so it does not matter which ones were seen before, or whether one comes again.
function show(event) {
  const data = JSON.parse(event.data);
  const card = cards.get(data.task);
  if (!card) return;
  const { letters } = data.kwargs;
  const bar = $("progress", card);
  const before = card.dataset.state;
  const title = `Names of at least ${number(letters)} ${letters === 1 ? "letter" : "letters"}`;
  const { done, of } = event.type === "succeeded" ? { done: data.result.of, of: data.result.of } : (data.meta ?? {});
  card.dataset.state = event.type;
  $("h2", card).textContent = title;

  const text = {
    waiting: () => "Waiting for a worker",
    started: () => "A worker has begun",
    progress: () => `${number(done)} of ${number(of)} files`,
    succeeded: () => `Done: ${number(done)} of ${number(of)} files`,
    failed: () => `Failed: ${data.error}`,
    revoked: () => "Stopped",
  }[event.type]();
  $(".state", card).textContent = text;
  const button = $("button", card);
  // Who had pressed it goes on from where it was, and not from the top of the page.
  if (over(card) && button === document.activeElement) $("#letters").focus();
  button.hidden = over(card);
  const further = Math.floor((4 * done) / of) > Math.floor((4 * bar.value) / bar.max);
  if (event.type === "progress" ? further || before === "unknown" : event.type !== before) say(`${title}: ${text}`);
  if (of) {
    bar.max = of;
    bar.value = done;
  }
  if (event.type === "succeeded") showNames($("ol", card), data.result.names);
  if ([...cards.values()].every(over)) source.close(); // nothing will come any more
}

function showNames(list, names) {
  list.hidden = false;
  list.replaceChildren(
    ...names.map(([name, count]) => {
      const item = document.createElement("li");
      const code = document.createElement("code");
      const times = document.createElement("span");
      code.textContent = name;
      times.textContent = number(count);
      item.append(code, times);
      return item;
    }),
  );
}

// A new EventSource has no cursor, and gets the latest event of each task. When its connection breaks it comes back by
// itself, with its cursor, and gets what it missed.
function listen() {
  source?.close();
  if (!cards.size) return;
  source = new EventSource("/stream?" + new URLSearchParams([...cards.keys()].map((task) => ["connectKey", "task-" + task])));
  for (const type of ["waiting", "started", "progress", "succeeded", "failed", "revoked"]) source.addEventListener(type, show);
  source.addEventListener("stream-reset", listen); // away for too long: begin anew, with the latest
  source.addEventListener("open", () => complain(""));
  source.addEventListener("error", (event) => {
    const given = event.target.readyState === EventSource.CLOSED;
    complain(given ? "The server refuses this page. Reload it to try again." : "The connection is cut. The browser tries again.");
  });
}

$("#start").addEventListener("submit", async (event) => {
  event.preventDefault();
  complain("");
  try {
    const answer = await fetch("/tasks", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ letters: $("#letters").valueAsNumber }),
    });
    if (!answer.ok) throw new Error(`the server says ${answer.status}`);
    add((await answer.json()).task);
  } catch (error) {
    complain(`The task could not be started: ${error.message}.`);
    return;
  }
  history.replaceState(null, "", "?" + new URLSearchParams([...cards.keys()].map((task) => ["task", task])));
  listen();
});

async function stop(task) {
  complain("");
  try {
    const answer = await fetch("/tasks/" + task, { method: "DELETE" });
    if (!answer.ok) throw new Error(`the server says ${answer.status}`);
  } catch (error) {
    complain(`The task could not be stopped: ${error.message}.`);
  }
}

for (const task of new Set(new URLSearchParams(location.search).getAll("task"))) add(task);
listen();
