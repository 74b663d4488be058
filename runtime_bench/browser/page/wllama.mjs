// wllama, llama.cpp as WebAssembly, one token at a time.
import { Wllama } from "/packages/@wllama/wllama/esm/index.js";

const FOLDER = "/packages/@wllama/wllama/esm/";
const QUIET = { debug() {}, log() {}, warn() {}, error: console.warn };

// A worker whose code runs on the page's own thread, which is the one that a browser can slow down.
class OwnThread {
  constructor(address) {
    this.code = fetch(address)
      .then((answer) => answer.text())
      .then((text) => new Function("postMessage", `let onmessage;\n${text};\nreturn onmessage;`))
      // Not by a timer: browsers let nested ones wait for 4 ms, which would be in every token.
      .then((run) => run((data) => queueMicrotask(() => this.onmessage({ data }))));
  }

  async postMessage(data) {
    (await this.code)({ data });
  }

  terminate() {}
}

export async function prepare({ mainThread }) {
  if (mainThread) globalThis.Worker = OwnThread;
}

export async function open(model, { context, threads, batchTokens }) {
  const wllama = new Wllama(
    {
      "single-thread/wllama.wasm": `${FOLDER}single-thread/wllama.wasm`,
      "multi-thread/wllama.wasm": `${FOLDER}multi-thread/wllama.wasm`,
    },
    { suppressNativeLog: true, logger: QUIET },
  );
  const file = await (await fetch(model.file)).blob();
  await wllama.loadModel([file], { n_ctx: context, n_threads: threads, n_batch: batchTokens });
  await wllama.samplingInit({ temp: 0 });
  return new Session(wllama);
}

class Session {
  constructor(wllama) {
    this.wllama = wllama;
    this.vocabulary = wllama.getModelMetadata().hparams.nVocab;
    this.facts = { threads: wllama.getNumThreads(), runtime: Wllama.getLibllamaVersion() };
  }

  async bos() {
    return this.wllama.mustAddBosToken() ? this.wllama.getBOS() : null;
  }

  async clear() {
    await this.wllama.kvClear();
  }

  async decode(tokens) {
    await this.wllama.decode(Array.from(tokens), {});
  }

  async tokenize(text) {
    const tokens = Array.from(await this.wllama.tokenize(text));
    const bos = await this.bos();
    return bos === null ? tokens : [bos, ...tokens];
  }

  async sample() {
    return (await this.wllama.samplingSample()).token;
  }
}
