// onnxruntime-web on WebAssembly. The cache is handed from run to run as it comes out: a page cannot lend it its memory.
import * as ort from "/packages/onnxruntime-web/dist/ort.wasm.min.mjs";
import { Tokenizer } from "/packages/@huggingface/tokenizers/dist/tokenizers.mjs";

const KEYS_AND_VALUES = "past_key_values.";
const CACHES = [KEYS_AND_VALUES, "past_conv.", "past_recurrent."];
const ARRAYS = { float32: Float32Array, float16: Uint16Array };

export async function prepare({ threads }) {
  ort.env.wasm.wasmPaths = "/packages/onnxruntime-web/dist/";
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  // The module is loaded with the first session; this one fails, after that.
  await ort.InferenceSession.create(new Uint8Array(), { executionProviders: ["wasm"] }).catch(() => {});
}

const ints = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const json = async (address) => (await fetch(address)).json();

export async function open(model, settings) {
  const session = await ort.InferenceSession.create(model.graph, {
    executionProviders: ["wasm"],
    externalData: model.data.map(({ name, address }) => ({ path: name, data: address })),
  });
  return new Session(session, await json(model.tokenizer), await json(model.tokenizerConfig), settings);
}

class Session {
  constructor(session, tokenizer, tokenizerConfig, { pieceTokens }) {
    this.session = session;
    this.tokenizer = new Tokenizer(tokenizer, tokenizerConfig);
    this.pieceTokens = pieceTokens;
    const logits = session.outputMetadata.find(({ name }) => name === "logits");
    this.vocabulary = logits.shape.at(-1);
    this.inputs = new Set(session.inputNames);
    this.caches = session.inputMetadata.filter(({ name }) => CACHES.some((prefix) => name.startsWith(prefix)));
    this.facts = { threads: ort.env.wasm.numThreads, runtime: ort.env.versions.web };
    this.clear();
  }

  bos() {
    return this.tokenize("")[0] ?? null;
  }

  clear() {
    this.past = 0;
    this.logits = null;
    this.cache = {};
    for (const { name, type, shape } of this.caches) {
      // One text, of which keys and values hold nothing yet; what else is kept does not grow with it.
      const sizes = shape.with(0, 1);
      if (name.startsWith(KEYS_AND_VALUES)) sizes[2] = 0;
      this.cache[name] = new ort.Tensor(type, new ARRAYS[type](sizes.reduce((a, b) => a * b)), sizes);
    }
  }

  async decode(tokens) {
    for (let start = 0; start < tokens.length; start += this.pieceTokens) {
      await this.decodePiece(tokens.slice(start, start + this.pieceTokens));
    }
  }

  async decodePiece(tokens) {
    const total = this.past + tokens.length;
    const feeds = { input_ids: ints(tokens), attention_mask: ints(new Array(total).fill(1)), ...this.cache };
    if (this.inputs.has("position_ids")) feeds.position_ids = ints(tokens.map((_, index) => this.past + index));
    const outputs = await this.session.run(feeds);
    for (const name in this.cache) this.cache[name] = outputs[name.replace(/^past(_key_values)?/, "present")];
    this.logits = outputs.logits;
    this.past = total;
  }

  tokenize(text) {
    return this.tokenizer.encode(text).ids;
  }

  sample() {
    const [, length, width] = this.logits.dims;
    const last = this.logits.data.subarray((length - 1) * width, length * width);
    return last.reduce((best, value, index) => (value > last[best] ? index : best), 0);
  }
}
