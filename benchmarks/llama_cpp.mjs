// Greedy tokens of a GGUF in llama.cpp, for benchmarks/generation.py: node llama_cpp.mjs GGUF PROMPT TOKENS THREADS
import { getLlama } from "node-llama-cpp";

const [, , modelPath, prompt, count, threads] = process.argv;
const llama = await getLlama({ build: "never", gpu: false, progressLogs: false, logLevel: "error" });
const model = await llama.loadModel({ modelPath });
const context = await model.createContext({ contextSize: 2048, threads: Number(threads), sequences: 1 });
const tokens = [];
const start = performance.now();
let first = start;
for await (const token of context.getSequence().evaluate(model.tokenize(prompt), { temperature: 0 })) {
  if (tokens.push(token) === 1) first = performance.now();
  if (tokens.length === Number(count)) break;
}
const end = performance.now();
console.log(JSON.stringify({ first: (first - start) / 1e3, later: (end - first) / 1e3 / (tokens.length - 1), tokens }));
process.exit(0);
