// Server-sent events out of a response's body. EventSource cannot post, so the few lines of its format are read here.

/**
 * The events of a stream, in order, as {event, data}; comments, ids and retry times are passed over.
 * Lines end with LF or CRLF. The body is cancelled when the caller stops early.
 */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = ""; // of a line that has not ended; only a new chunk is searched, as a line may hold a whole picture
  let event = "message";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = value.split("\n");
      lines[0] = rest + lines[0];
      rest = lines.pop();
      for (const ended of lines) {
        const line = ended.endsWith("\r") ? ended.slice(0, -1) : ended;
        if (line === "") {
          if (data.length) yield { event, data: data.join("\n") };
          event = "message";
          data = [];
        } else if (line.startsWith("event:")) {
          event = valueOf(line, 6);
        } else if (line.startsWith("data:")) {
          data.push(valueOf(line, 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it has ended, or was aborted: either way nobody reads on
  }
}

function valueOf(line, start) {
  return line.slice(line[start] === " " ? start + 1 : start);
}
