// Types of sse.js.

/** A block of an event stream: `data`, `event` and `id` where it has such lines. Or else `retry` (milliseconds) alone. */
export interface Block {
  data?: string;
  event?: string;
  id?: string;
  retry?: number;
  /** The last comment in the block, without the colon and the space after it. */
  comment?: string;
}

/**
 * Parse `text/event-stream` as the HTML standard says. The function that it gives takes bytes, cut anywhere, and calls
 * `take` for each block that has ended, and for each `retry` line at once, as that counts from there on.
 */
export function parser(take: (block: Block) => void): (bytes: Uint8Array) => void;

/**
 * - `"connecting"`: there is no stream at the moment, and it is being tried
 * - `"open"`: events arrive, here or in the tab that leads
 * - `"closed"`: for good
 */
export type State = "connecting" | "open" | "closed";

/** `data` is the event's text or, with `json`, the value that it stands for; text that is no JSON stays text. */
export type Listener<T = any> = (data: T, event: MessageEvent<string>) => void;

export interface Options {
  /** The keys to listen to; they are added to the URL. */
  keys?: readonly string[];
  /** The query parameter that names a key, as in `SSE_KEY_PARAM`; by default `"connectKey"`. */
  keyParam?: string;
  /** Listeners by the names of their events; an event without a name is a `"message"`. */
  events?: Record<string, Listener>;
  /** Give listeners of `events` and `on` the parsed data. By default they get text. */
  json?: boolean;
  /** One connection for all tabs of the origin; by default `true`. Without Web Locks each tab has its own all the same. */
  shared?: boolean;
  /**
   * What tabs that share a connection have in common, and what the cursor is kept under; by default the whole URL with
   * its keys. Give one where the URL holds a ticket or `lastEventId`: name the keys in it, and the user if others may
   * use this browser too.
   */
  name?: string;
  /** Where the cursor is kept over page loads; by default `sessionStorage`. `null`: nowhere. */
  storage?: Pick<Storage, "getItem" | "setItem" | "removeItem"> | null;
  /**
   * Milliseconds of silence after which a connection is given up and opened again; by default 30000. It has to be longer
   * than `SSE_PING_INTERVAL`. 0: never.
   */
  timeout?: number;
  /** Gives headers to send with each request, `Authorization` among them. */
  headers?: () => Record<string, string> | Promise<Record<string, string>>;
  /** As for `fetch`; by default `"same-origin"`. */
  credentials?: RequestCredentials;
  /**
   * Called after `stream-expired`, and once after an answer 401 or 403. Gives the URL to use from now on, with its keys;
   * or nothing, where `headers` have changed instead; or `null` to stop. What it throws is tried again later.
   */
  renew?: () => string | null | undefined | void | Promise<string | null | undefined | void>;
  /** Events were missed and cannot be had any more (`stream-reset`): load the page's state anew. */
  onReset?: Listener<{ reason: string; keys: string[] }>;
  /** The ticket has expired or was revoked (`stream-expired`). */
  onExpired?: Listener<{ reason: string }>;
  /** Events were dropped since this client was too slow (`stream-dropped`). */
  onDropped?: Listener<{ count: number; keys: string[] }>;
  /** Called with each new state; with `"closed"`, `status` is the HTTP status that was final, or 0 after `close()`. */
  onState?: (state: State, status?: number) => void;
}

/** A stream. Each event is dispatched as a `MessageEvent` with `data` and `lastEventId`, as by an `EventSource`. */
export interface Source extends EventTarget {
  readonly state: State;
  /** Whether this tab has the connection. */
  readonly leader: boolean;
  /** Add a listener; the function that it gives removes it. `json`, if given, overrides the option. */
  on(name: string, listener: Listener, json?: boolean): () => void;
  /** End it in this tab. Where this one had the connection, another tab takes over. The cursor is kept. */
  close(): void;
}

/** Listen to a stream. */
export function connect(url: string | URL, options?: Options): Source;
