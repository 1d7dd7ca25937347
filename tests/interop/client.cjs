// A client of a Hearth daemon in JavaScript, made from the protos alone: streams a chat, asks the health service, lists
// the services by reflection and calls one of them with nothing but what reflection told.
//
//   node client.cjs --address HOST:PORT|unix:///PATH --protos DIR [--ca FILE] [--token-file FILE] [--question TEXT]
//
// Prints one JSON object. Exit code 1 and one line on stderr if any call fails.
"use strict";

const fs = require("node:fs");
const path = require("node:path");
const { parseArgs } = require("node:util");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const LOADING = { keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true };

const { values: options } = parseArgs({
  options: {
    address: { type: "string" },
    protos: { type: "string" },
    ca: { type: "string" },
    "token-file": { type: "string" },
    question: { type: "string", default: "Say hello." },
  },
});

const credentials = options.ca
  ? grpc.credentials.createSsl(fs.readFileSync(options.ca))
  : grpc.credentials.createInsecure();

function metadata() {
  const made = new grpc.Metadata();
  if (options["token-file"]) {
    made.set("authorization", `Bearer ${fs.readFileSync(options["token-file"], "utf8").trim()}`);
  }
  return made;
}

function deadline() {
  return new Date(Date.now() + 120_000);
}

function load(directory, ...files) {
  return grpc.loadPackageDefinition(protoLoader.loadSync(files, { ...LOADING, includeDirs: [directory] }));
}

function unary(client, method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, metadata(), { deadline: deadline() }, (error, response) =>
      error ? reject(error) : resolve(response));
  });
}

function chat(client) {
  return new Promise((resolve, reject) => {
    const call = client.Chat(
      {
        messages: [{ role: "ROLE_USER", content: options.question }],
        sampling: { temperature: 0, max_tokens: 24 },
        request_id: "interop-1",
      },
      metadata(),
      { deadline: deadline() },
    );
    const deltas = [];
    let final = null;
    call.on("data", (response) => {
      if (response.event === "delta") deltas.push(response.delta.text);
      if (response.event === "final") final = response.final;
    });
    call.on("error", reject);
    call.on("end", () => resolve({ text: deltas.join(""), deltas: deltas.length, final }));
  });
}

function reflect(client, request) {
  return new Promise((resolve, reject) => {
    const call = client.ServerReflectionInfo(metadata(), { deadline: deadline() });
    call.on("data", (response) => {
      resolve(response);
      call.end();
    });
    call.on("error", reject);
    call.write(request);
  });
}

// A FileDescriptorSet is its files, each as field 1: a tag, the length as a varint, the bytes.
function descriptorSet(files) {
  const parts = [];
  for (const file of files) {
    const header = [0x0a];
    let length = file.length;
    for (; length > 127; length = Math.floor(length / 128)) header.push((length % 128) | 128);
    header.push(length);
    parts.push(Buffer.from(header), file);
  }
  return Buffer.concat(parts);
}

async function main() {
  const own = path.join(__dirname, "protos");
  const hearth = load(options.protos, "hearth/v1/chat.proto", "hearth/v1/model.proto", "hearth/v1/status.proto").hearth.v1;
  const standard = load(own, "health.proto", "reflection.proto").grpc;

  const health = new standard.health.v1.Health(options.address, credentials);
  const reflection = new standard.reflection.v1alpha.ServerReflection(options.address, credentials);

  const told = await reflect(reflection, { file_containing_symbol: "hearth.v1.StatusService" });
  const fromReflection = grpc.loadPackageDefinition(
    protoLoader.loadFileDescriptorSetFromBuffer(
      descriptorSet(told.file_descriptor_response.file_descriptor_proto), LOADING),
  ).hearth.v1;

  const result = {
    chat: await chat(new hearth.ChatService(options.address, credentials)),
    models: (await unary(new hearth.ModelService(options.address, credentials), "ListModels", {})).models,
    health: (await unary(health, "Check", {})).status,
    chat_health: (await unary(health, "Check", { service: "hearth.v1.ChatService" })).status,
    services: (await reflect(reflection, { list_services: "" })).list_services_response.service.map((one) => one.name),
    status: await unary(new fromReflection.StatusService(options.address, credentials), "GetStatus", {}),
  };
  process.stdout.write(`${JSON.stringify(result)}\n`);
}

main().then(
  () => process.exit(0),
  (error) => {
    process.stderr.write(`${error.message}\n`);
    process.exit(1);
  },
);
