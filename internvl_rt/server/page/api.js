// Talks to the server: keys, errors in the server's own words, and the events of a streamed answer.

const KEY = "internvl_rt.key"; // in sessionStorage, so that it ends with the tab

/** A failed request. The message is for the reader; status is 0 where no answer came. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

let askForKey; // (reason) => the key, or null when the reader gives none
let asking = null; // the one question for a key that several requests may wait for

export function askForKeyWith(ask) {
  askForKey = ask;
}

/** Sends one request, a POST if it has a body, and returns the response. Asks for a key while one is missing. */
export async function send(path, { body, headers = {}, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await fetch(path, {
      method: body ? "POST" : "GET",
      body: body && JSON.stringify(body),
      headers: {
        ...headers,
        ...(body && { "content-type": "application/json" }),
        ...(key && { authorization: `Bearer ${key}` }),
      },
      signal,
    }).catch((error) => {
      throw unreachable(error, signal);
    });
    if (response.ok) return response;
    const failure = await readFailure(response);
    if (response.status !== 401) throw failure;
    if (sessionStorage.getItem(KEY) !== key) continue; // another request has got one meanwhile
    asking ??= askForKey(failure.message).finally(() => (asking = null));
    const given = await asking;
    if (given === null) throw failure;
    sessionStorage.setItem(KEY, given);
  }
}

/** Yields the events of a stream up to [DONE]. Throws an event that is an error, and where the stream only stops. */
export async function* readEvents(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw unreachable(error, signal);
    });
    if (done) throw new ServerError("The connection ended before the answer was complete.");
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue; // a comment that keeps the connection alive, or the end of an event
      const data = line.slice("data:".length).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message);
      yield event;
    }
  }
}

function unreachable(error, signal) {
  if (signal?.aborted) return error;
  return new ServerError("The server cannot be reached. Check that it still runs, then try again.");
}

async function readFailure(response) {
  const answer = await response.json().catch(() => null);
  const message = answer?.error?.message ?? `The server answered with status ${response.status} and no reason.`;
  const seconds = readRetryAfter(response.headers);
  return new ServerError(seconds ? `${message}. Try again in ${seconds} s.` : message, response.status);
}

/** Returns the whole seconds after which the server wants to be asked again; 0 if it does not say. */
function readRetryAfter(headers) {
  const after = headers.get("retry-after");
  const milliseconds = Number(headers.get("retry-after-ms")) || 1000 * Number(after) || Date.parse(after) - Date.now();
  return Math.max(0, Math.ceil(milliseconds / 1000) || 0);
}
