// Requests to the server, and what it tells by itself.

/** Tells this page from other tabs. */
export const CLIENT = crypto.randomUUID();

/** A refusal of the server, or its absence (status 0). */
export class Refusal extends Error {
  constructor(status, { problem, remedy = "", now = null }) {
    super([problem, remedy].filter(Boolean).join(" "));
    this.status = status;
    this.now = now;
  }
}

async function ask(path, settings = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...settings, headers: { "x-studio-client": CLIENT, ...settings.headers } });
  } catch {
    throw new Refusal(0, { problem: "The studio does not answer.", remedy: "Is it still running?" });
  }
  if (answer.ok) return answer.json();
  const isJson = answer.headers.get("content-type")?.startsWith("application/json");
  throw new Refusal(answer.status, isJson ? await answer.json() : { problem: await answer.text() });
}

export const get = (path, query = {}) => {
  const text = new URLSearchParams(query).toString();
  return ask(text ? `${path}?${text}` : path);
};

const withBody = (method, body, more = {}) => ({
  method,
  body: JSON.stringify(body),
  ...more,
  headers: { "content-type": "application/json", ...more.headers },
});

export const post = (path, body = {}, more = {}) => ask(path, withBody("POST", body, more));

/** Write a caption that is expected to be the one with this tag. `keepalive` lets the request outlive the page. */
export const putCaption = (id, encoder, tag, body, keepalive = false) =>
  ask(`/api/images/${id}/captions/${encoder}`, withBody("PUT", body, { keepalive, headers: { "if-match": `"${tag}"` } }));

/** Call the listener of each kind of news; "connected" comes first, and again after the server was away. */
export function listen(listeners) {
  const source = new EventSource("/api/events");
  source.addEventListener("message", (event) => {
    const news = JSON.parse(event.data);
    listeners[news.kind]?.(news);
  });
  source.addEventListener("open", () => listeners.connected());
}
