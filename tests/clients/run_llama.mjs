// llama.cpp through its bindings for node: node run_llama.mjs ORDER OUT FILES (a folder of NAME.gguf).
// For ORDER's rows (token ids), where it has any, OUT gets the log-probabilities of all tokens after each token of a row.
import fs from "node:fs";
import path from "node:path";
import {getLlama} from "node-llama-cpp";

const [orderFile, outFile, files] = process.argv.slice(2);
const order = JSON.parse(fs.readFileSync(orderFile, "utf8"));
const failed = JSON.parse(fs.readFileSync(path.join(files, "errors.json"), "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const found = {};
for (const name of Object.keys(order.folders)) {
    if (failed[name]) {
        found[name] = {error: `converter: ${failed[name]}`};
        continue;
    }
    try {
        const modelPath = path.join(files, name.replaceAll("/", "-") + ".gguf");
        const model = await llama.loadModel({modelPath, useMmap: false});
        const context = await model.createContext({
            contextSize: 128, sequences: 1, threads: 1, flashAttention: false,
            experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
        });
        const sequence = context.getSequence();
        const result = {tokens: [], logprobs: [], dtype: null};
        for (const prompt of order.prompts) {
            await sequence.clearHistory();
            const tokens = [], logprobs = [];
            let input = prompt.slice();
            for (let step = 0; step < order.tokens; step++) {
                const asked = input.map((token, place) => (
                    place + 1 < input.length ? token : [token, {generateNext: {token: true, confidence: true}}]
                ));
                const next = (await sequence.controlledEvaluate(asked)).at(-1).next;
                tokens.push(next.token);
                logprobs.push(Math.log(next.confidence));
                input = [next.token];
            }
            result.tokens.push(tokens);
            result.logprobs.push(logprobs);
        }
        if (order.rows) result.rows = [];
        for (const row of order.rows ?? []) {
            await sequence.clearHistory();
            const asked = row.map((token) => [token, {generateNext: {token: true, probabilities: true}}]);
            result.rows.push((await sequence.controlledEvaluate(asked)).map(({next}) => {
                const logs = new Array(next.probabilities.size);
                for (const [token, probability] of next.probabilities) logs[token] = Math.log(probability);
                return logs;
            }));
        }
        await context.dispose();
        await model.dispose();
        found[name] = result;
    } catch (error) {
        found[name] = {error: String(error).slice(0, 600)};
    }
    fs.writeFileSync(outFile, JSON.stringify(found));
}
await llama.dispose();
