// Greedy tokens of an exported folder in transformers.js:
//   node generate.mjs PARENT NAME DTYPE TEXT MAX_NEW_TOKENS
// prints {"prompt": [...], "answer": [...]} as token ids.
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";

const [parent, name, dtype, text, count] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = parent;

const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name, {
  dtype,
  device: "cpu",
  session_options: { intraOpNumThreads: 1 },
});
const messages = [{ role: "user", content: text }];
const inputs = tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
const output = await model.generate({ ...inputs, max_new_tokens: Number(count), do_sample: false });
const ids = output.tolist()[0].map(Number);
const length = inputs.input_ids.dims[1];
console.log(JSON.stringify({ prompt: ids.slice(0, length), answer: ids.slice(length) }));
