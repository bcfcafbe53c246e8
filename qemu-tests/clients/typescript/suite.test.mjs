// The published TypeScript client, unmodified. PANDASTACK_API and PANDASTACK_API_KEY say which appliance.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { after, before } from "node:test";

import { AuthError, BadRequestError, Client, NotFoundError, Sandbox, SandboxTimeout } from "@pandastack/sdk";

import { CLI, cli, test } from "./surface.mjs";

const client = new Client();
let sandbox;

before(async () => {
  sandbox = await Sandbox.create({ template: "base", metadata: { suite: "ts" } }, client);
});
after(async () => sandbox?.kill());

test("a plain create uses the client's own default template", async () => {
  const plain = await Sandbox.create({}, client);
  assert.equal(plain.status, "running");
  await plain.kill();
  await assert.rejects(Sandbox.get(plain.id, client), NotFoundError);
});

test("get and list", async () => {
  assert.equal((await Sandbox.get(sandbox.id, client)).id, sandbox.id);
  assert.ok((await Sandbox.list(client)).some((one) => one.id === sandbox.id));
});

test("exec keeps streams and exit code apart", async () => {
  const result = await sandbox.exec("echo out; echo err >&2; exit 3");
  assert.deepEqual([result.stdout, result.stderr, result.exitCode ?? result.exit_code], ["out\n", "err\n", 3]);
});

test("a timeout is its own error", async () => {
  await assert.rejects(sandbox.exec("sleep 60", { timeoutSeconds: 2 }), SandboxTimeout);
});

test("execStream returns the real exit code and all output", async () => {
  let out = "";
  let err = "";
  const code = await sandbox.execStream("for i in 1 2 3; do echo $i; echo e$i >&2; done; exit 9", {
    onStdout: (chunk) => (out += chunk),
    onStderr: (chunk) => (err += chunk),
  });
  assert.deepEqual([code, out, err], [9, "1\n2\n3\n", "e1\ne2\ne3\n"]);
});

test("runCode in python and shell", async () => {
  assert.equal((await sandbox.runCode("for i in range(2):\n    print(i)", "python")).stdout, "0\n1\n");
  assert.equal((await sandbox.runCode("echo $((6*7))", "shell")).stdout, "42\n");
});

test("code contexts keep their state and show what a notebook shows", async () => {
  const notebook = await Sandbox.create({ template: "code-interpreter" }, client);
  try {
    const context = await notebook.createCodeContext("python");
    await context.runCode("x = 41");
    const ran = await context.runCode("import matplotlib.pyplot as plt\nprint('hi')\nplt.plot([1, 2])\nplt.show()\nx + 1");
    assert.deepEqual([ran.stdout, ran.exit_code, ran.results.at(-1).text], ["hi\n", 0, "42"]);
    assert.ok(ran.png.startsWith("iVBOR"));
    assert.match((await context.runCode("1 / 0")).error, /ZeroDivisionError/);
    await assert.rejects(context.runCode("import time; time.sleep(60)", { timeoutSeconds: 2 }), SandboxTimeout);
    assert.equal((await context.runCode("x")).text, "41");
    await context.close();
    await assert.rejects(context.runCode("x"), NotFoundError);
  } finally {
    await notebook.kill();
  }
});

test("files", async () => {
  await sandbox.filesystem.write("/tmp/ts dir/a+b.txt", "pändä");
  assert.equal(await sandbox.filesystem.read("/tmp/ts dir/a+b.txt"), "pändä");
  assert.equal((await sandbox.filesystem.stat("/tmp/ts dir/a+b.txt")).size, 7);
  assert.ok(await sandbox.filesystem.exists("/tmp/ts dir"));
  assert.ok(!(await sandbox.filesystem.exists("/tmp/none")));
  assert.deepEqual((await sandbox.filesystem.list("/tmp/ts dir")).map((info) => info.name), ["a+b.txt"]);
  const walked = [];
  for await (const entry of sandbox.filesystem.walk("/tmp/ts dir")) walked.push(entry);
  assert.equal(walked.length, 1);
  await assert.rejects(sandbox.filesystem.read("/none"), NotFoundError);
});

test("lifecycle", async () => {
  assert.equal((await sandbox.setTtl(777)).ttl_seconds, 777);
  assert.equal((await sandbox.setPersistent(true)).persistent, true);
  await sandbox.setPersistent(false);
  assert.equal((await sandbox.lifecycle()).persistent, false);
});

test("tokens, templates and me", async () => {
  const made = await client.tokens.create("ts");
  assert.ok((await client.tokens.list()).some((token) => token.prefix === made.prefix));
  await client.tokens.revoke(made.prefix);
  await assert.rejects(new Client({ apiKey: made.token }).me(), AuthError);
  assert.ok((await client.templates.list()).some((template) => template.name === "base"));
  assert.equal((await client.me()).auth_method, "token");
});

test("errors", async () => {
  await assert.rejects(Sandbox.create({ template: "no-such" }, client), BadRequestError);
  await assert.rejects(Sandbox.get("nothing", client), NotFoundError);
  await assert.rejects(new Client({ apiKey: "pds_" + "1".repeat(32) }).me(), AuthError);
});

test("the command line of the same package", async () => {
  assert.match(cli("sandbox", "list"), new RegExp(sandbox.id.slice(0, 8)));
  assert.match(cli("sandbox", "exec", sandbox.id, "--", "echo", "from-cli"), /from-cli/);
});

test("a terminal from the command line", async () => {
  const terminal = spawn(process.execPath, [CLI, "ssh", sandbox.id], { stdio: ["pipe", "pipe", "inherit"] });
  terminal.stdin.write("stty size; echo $((6 * 7)) of $TERM; exit 5\r");
  let shown = "";
  for await (const part of terminal.stdout) shown += part;
  assert.match(shown, /24 80\r?\n42 of xterm-256color/);
  assert.doesNotMatch(shown, /"exit"/);
});

test("a Dockerfile becomes a template, with its log", { timeout: 1800_000 }, async () => {
  const name = "suite-ts";
  const build = await client.templates.buildFromDockerfile({
    name,
    dockerfile: "FROM base\nCOPY sub/a.txt /a.txt\n",
    context: { "sub/a.txt": "from a client that names files by their last part\n" },
    sizeMb: 128,
  });
  try {
    const lines = [];
    for await (const line of client.templates.buildLogs(build.id)) lines.push(line);
    assert.equal((await client.templates.waitForBuild(build.id, { timeoutMs: 1500_000 })).status, "done", lines.join("\n"));
    assert.equal(lines.at(-1), "==> done");
    const made = await Sandbox.create({ template: name }, client);
    try {
      assert.match((await made.exec("cat /a.txt")).stdout, /last part/);
    } finally {
      await made.kill();
    }
    assert.ok((await client.templates.builds()).some((one) => one.id === build.id));
  } finally {
    await client.templates.delete(name);
  }
  await assert.rejects(client.templates.get(name), NotFoundError);
  await assert.rejects(client.templates.delete("base"), AuthError);
});
