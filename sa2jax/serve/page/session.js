// A realtime session: a WebSocket with events, and base64 of samples.
export class Session extends EventTarget {
  constructor(key) {
    super();
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const protocols = ["realtime", ...(key ? [`openai-insecure-api-key.${key}`] : [])];
    this.socket = new WebSocket(`${scheme}://${location.host}/v1/realtime`, protocols);
    this.socket.onmessage = ({ data }) => {
      const event = JSON.parse(data);
      this.dispatchEvent(new CustomEvent(event.type, { detail: event }));
    };
    this.socket.onclose = ({ code }) => this.dispatchEvent(new CustomEvent("closed", { detail: { code } }));
  }

  on(type, handle) {
    this.addEventListener(type, ({ detail }) => handle(detail));
    return this;
  }

  send(type, fields = {}) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type, ...fields }));
  }

  close() {
    this.socket.close();
  }
}

export function toBase64(buffer) {
  return btoa(String.fromCharCode(...new Uint8Array(buffer)));
}

export function toSamples(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return Float32Array.from(new Int16Array(bytes.buffer), (sample) => sample / 32768);
}
