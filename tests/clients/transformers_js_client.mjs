// Generate with transformers.js: node transformers_js_client.mjs FOLDER [image-text], in the folder of the installed
// package.
import path from "node:path";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { text } from "node:stream/consumers";

const require = createRequire(path.join(process.cwd(), "package.json"));
const { AutoModelForCausalLM, AutoModelForImageTextToText, Tensor, env } = await import(
  pathToFileURL(require.resolve("@huggingface/transformers"))
);
env.allowRemoteModels = false;
env.localModelPath = "";

const { cases } = JSON.parse(await text(process.stdin));
const AutoModel = process.argv[3] === "image-text" ? AutoModelForImageTextToText : AutoModelForCausalLM;
const model = await AutoModel.from_pretrained(process.argv[2], { local_files_only: true });
const tensor = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);

const answers = [];
for (const { ids, mask, pixels, new: count } of cases) {
  const given = { inputs: tensor(ids), attention_mask: tensor(mask) };
  if (pixels.length) {
    const shape = [pixels.length, pixels[0].length, pixels[0][0].length, pixels[0][0][0].length];
    given.pixel_values = new Tensor("float32", Float32Array.from(pixels.flat(Infinity)), shape);
  }
  const options = { max_new_tokens: count, do_sample: false, eos_token_id: -1, pad_token_id: 0, repetition_penalty: 1,
    forced_eos_token_id: null };
  const made = await model.generate({ ...given, ...options });
  answers.push(made.tolist().map((row) => row.slice(ids[0].length).map(Number)));
}
console.log(JSON.stringify({ versions: { "@huggingface/transformers": env.version }, answers }));
