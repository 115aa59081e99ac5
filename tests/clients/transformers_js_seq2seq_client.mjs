// Generate with an encoder-decoder model in transformers.js: node ... FOLDER, in the folder of the installed package.
import path from "node:path";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { text } from "node:stream/consumers";

const require = createRequire(path.join(process.cwd(), "package.json"));
const { AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, PreTrainedModel, Tensor, env } = await import(
  pathToFileURL(require.resolve("@huggingface/transformers"))
);
env.allowRemoteModels = false;
env.localModelPath = "";

const { cases } = JSON.parse(await text(process.stdin));
const AutoModel = "input_features" in cases[0].encoder ? AutoModelForSpeechSeq2Seq : AutoModelForSeq2SeqLM;
const model = await AutoModel.from_pretrained(process.argv[2], { local_files_only: true });
const shape = (rows) => (Array.isArray(rows) ? [rows.length, ...shape(rows[0])] : []);
const integers = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat(Infinity).map(BigInt)), shape(rows));
const floats = (rows) => new Tensor("float32", Float32Array.from(rows.flat(Infinity)), shape(rows));

const answers = [];
for (const { encoder, ids, new: count } of cases) {
  const given = {};
  for (const [name, rows] of Object.entries(encoder)) given[name] = name === "input_features" ? floats(rows) : integers(rows);
  const options = { max_new_tokens: count, do_sample: false, eos_token_id: -1, pad_token_id: 0, repetition_penalty: 1,
    forced_eos_token_id: null, suppress_tokens: null, begin_suppress_tokens: null };
  const made = await model.generate({ ...given, decoder_input_ids: ids, ...options });
  answers.push(made.tolist().map((row) => row.slice(ids[0].length).map(Number)));
}
console.log(JSON.stringify({ versions: { "@huggingface/transformers": env.version }, answers }));
