// Sound of the microphone as blocks of 16-bit samples; runs in the audio thread.
const BLOCK = 960; // samples: 40 ms at 24 kHz

class Microphone extends AudioWorkletProcessor {
  #block = new Int16Array(BLOCK);
  #filled = 0;

  process([input]) {
    for (const sample of input[0] ?? []) {
      this.#block[this.#filled++] = Math.max(-1, Math.min(1, sample)) * 32767;
      if (this.#filled === BLOCK) {
        this.port.postMessage(this.#block.buffer.slice(0));
        this.#filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("microphone", Microphone);
