// What the measuring process calls: open a file in an engine, time work on it. Times are milliseconds.
const ENGINES = { "onnxruntime-web": "./onnxruntime.mjs", wllama: "./wllama.mjs" };

let engine;
let session;

// Load an engine's own code, so that its cost is in no measurement.
async function prepare(name, settings) {
  engine = await import(ENGINES[name]);
  await engine.prepare(settings);
}

async function open(model, settings) {
  const started = performance.now();
  session = await engine.open(model, settings);
  const loaded = performance.now() - started;
  return { loaded, vocabulary: session.vocabulary, bos: await session.bos(), ...session.facts };
}

// Work is a list of pieces to decode one by one, or a text of which the first `count` tokens are decoded.
async function run(work) {
  if (work.text === undefined) {
    for (const tokens of work.pieces) await session.decode(tokens);
  } else {
    await session.decode((await session.tokenize(work.text)).slice(0, work.count));
    await session.sample();
  }
}

async function time(work, warmup, depth, samples) {
  if (warmup) {
    await session.clear();
    await run(warmup);
  }
  const times = [];
  for (let sample = 0; sample < samples; sample++) {
    await session.clear();
    if (depth.length) await session.decode(depth);
    const started = performance.now();
    await run(work);
    times.push(performance.now() - started);
  }
  return times;
}

async function greedy(prompt, count) {
  await session.clear();
  await session.decode(prompt);
  const tokens = [];
  while (tokens.length < count) {
    tokens.push(await session.sample());
    if (tokens.length < count) await session.decode(tokens.slice(-1));
  }
  return tokens;
}

const tokenize = async (text) => Array.from(await session.tokenize(text));

window.bench = { prepare, open, time, greedy, tokenize };
