// The page's address names its job (?answer=...), so it can be reloaded, kept and passed on. A job is read from its
// beginning each time, so nothing is kept here. Nothing that was received is ever put into the page as HTML.
"use strict";

const $ = (selector) => document.querySelector(selector);
const ENDS = { done: "Done", failed: "Failed", cancelled: "Stopped" };

let source = null; // the job that is read
let reading = null; // the request that is read, by POST

function show(state, text) {
  $("#answer").hidden = false;
  if ($("#answer").dataset.state !== state) $("#says").textContent = text;
  $("#answer").dataset.state = state;
  $("#state").textContent = text;
  $("#stop").hidden = state !== "writing";
  $("#text").setAttribute("aria-busy", state === "writing");
}

function begin() {
  source?.close();
  reading?.abort();
  source = reading = null;
  complain("");
  clear();
  show("writing", "Writing");
}

function clear() {
  $("#text").replaceChildren();
  $("#count").textContent = "";
}

function add(piece) {
  const text = $("#text");
  text.append(piece);
  const count = text.childNodes.length;
  $("#count").textContent = `${count} ${count === 1 ? "piece" : "pieces"}`;
}

function complain(text) {
  $("#problem").textContent = text;
  $("#problem").hidden = !text;
}

// A job: the browser's own EventSource comes back by itself, with its cursor, and gets what it missed.

function follow(id) {
  begin();
  source = new EventSource("/answers/" + encodeURIComponent(id));
  source.addEventListener("token", (event) => add(event.data));
  source.addEventListener("stream-reset", clear); // what follows is all that there is
  source.addEventListener("open", () => complain(""));
  for (const [name, text] of Object.entries(ENDS)) {
    source.addEventListener(name, (event) => {
      show(name, text);
      if (name === "failed") complain(event.data === "interrupted" ? "The server that asked the model is gone." : event.data);
      event.target.close();
    });
  }
  source.addEventListener("error", (event) => {
    if (event.target.readyState === EventSource.CLOSED) {
      show("failed", "Gone");
      complain("There is no such answer, or it is no longer kept.");
    } else {
      complain("The connection is cut. The browser tries again.");
    }
  });
}

async function start(prompt, unread) {
  const answer = await post("/answers", { prompt, unread });
  const { id } = await answer.json();
  history.replaceState(null, "", "?" + new URLSearchParams({ answer: id }));
  follow(id);
}

// One request: EventSource cannot post, so what comes is read by hand. Whoever leaves the page ends it, and the model's.

async function request(prompt) {
  history.replaceState(null, "", location.pathname);
  begin();
  const mine = (reading = new AbortController());
  try {
    const answer = await post("/v1/chat/completions", { messages: [{ role: "user", content: prompt }] }, mine.signal);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("The answer broke off.");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        if (line === "data: [DONE]") return show("done", ENDS.done);
        const { choices, error } = JSON.parse(line.slice(6));
        if (error) throw new Error(error.message);
        add(choices[0].delta.content ?? "");
      }
    }
  } catch (error) {
    if (mine !== reading) return; // another question was asked
    if (mine.signal.aborted) return show("cancelled", ENDS.cancelled);
    show("failed", ENDS.failed);
    complain(error.message);
  }
}

async function post(url, order, signal) {
  const headers = { "Content-Type": "application/json" };
  const answer = await fetch(url, { method: "POST", headers, body: JSON.stringify(order), signal });
  if (!answer.ok) throw new Error(`The server says ${answer.status}.`);
  return answer;
}

$("#ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const prompt = $("#prompt").value;
  const way = new FormData($("#ask")).get("way") ?? $("input[name=way]:checked").value;
  try {
    await (way === "request" ? request(prompt) : start(prompt, way));
  } catch (error) {
    complain(`The question could not be asked. ${error.message}`);
  }
});

$("#prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("#ask").requestSubmit();
});

$("#stop").addEventListener("click", async () => {
  $("#prompt").focus(); // the button is about to go
  if (reading) return reading.abort();
  await fetch(source.url, { method: "DELETE" });
});

// What the model does, for every page.
new EventSource("/stream?connectKey=model").addEventListener("busy", (event) => {
  const { busy } = JSON.parse(event.data);
  $("#model").dataset.busy = busy;
  $("#model b").textContent = busy ? `The model writes ${busy === 1 ? "an answer" : `${busy} answers`}` : "The model is idle";
});

const answer = new URLSearchParams(location.search).get("answer");
if (answer) follow(answer);
