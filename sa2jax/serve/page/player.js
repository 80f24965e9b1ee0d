// Plays sound as it comes, and knows how much of each answer was heard.
export const RATE = 24000;
const BUFFER = 0.06; // s that are kept ahead, so that a late piece leaves no gap
const LOOPBACK_WAIT = 2000; // ms

export class Player {
  onquiet = null; // called when all sound was played
  #sources = new Set();
  #end = 0; // time of the context until which there is sound
  #item = null;
  #parts = []; // of the item: when each begins, and how long it is

  constructor(context) {
    this.context = context;
    this.output = context.createGain();
  }

  // Through a peer connection of this page with itself: the browser's echo cancellation knows what
  // such a connection plays, and not always what else a page plays. Says whether that works.
  async connect(audio) {
    const here = new RTCPeerConnection(), there = new RTCPeerConnection();
    here.onicecandidate = ({ candidate }) => candidate && there.addIceCandidate(candidate);
    there.onicecandidate = ({ candidate }) => candidate && here.addIceCandidate(candidate);
    const destination = this.context.createMediaStreamDestination();
    const stream = new Promise((resolve) => (there.ontrack = (event) => resolve(event.streams[0])));
    const connected = new Promise((resolve) => {
      here.onconnectionstatechange = () => here.connectionState === "connected" && resolve(true);
      setTimeout(() => resolve(false), LOOPBACK_WAIT);
    });
    here.addTrack(destination.stream.getAudioTracks()[0], destination.stream);
    await here.setLocalDescription();
    await there.setRemoteDescription(here.localDescription);
    await there.setLocalDescription();
    await here.setRemoteDescription(there.localDescription);
    if (await connected) {
      audio.srcObject = await stream;
      await audio.play();
      this.output.connect(destination);
      return true;
    }
    here.close();
    there.close();
    this.output.connect(this.context.destination);
    return false;
  }

  play(item, samples) {
    if (item !== this.#item) [this.#item, this.#parts] = [item, []];
    const buffer = this.context.createBuffer(1, samples.length, RATE);
    buffer.copyToChannel(samples, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.output);
    const start = Math.max(this.#end, this.context.currentTime + BUFFER);
    source.start(start);
    this.#end = start + buffer.duration;
    this.#parts.push([start, buffer.duration]);
    this.#sources.add(source);
    source.onended = () => {
      this.#sources.delete(source);
      if (this.#sources.size === 0) this.onquiet?.();
    };
  }

  get playing() {
    return this.#end > this.context.currentTime;
  }

  // Silence at once; gives the answer that was cut and the ms of it that were heard, or null.
  stop() {
    if (!this.playing || this.#item === null) return null;
    const now = this.context.currentTime;
    const heard = this.#parts.map(([start, length]) => Math.max(0, Math.min(length, now - start)));
    for (const source of this.#sources) source.stop();
    this.#sources.clear();
    this.#end = now;
    return { item: this.#item, ms: Math.floor(1000 * heard.reduce((a, b) => a + b, 0)) };
  }
}
