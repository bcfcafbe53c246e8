'use strict';
// Cells of JavaScript, one after the other, in the global scope of this process.
//
// Owns: what a notebook expects beyond scripts: `await` and `import` outside of functions, names that may be declared again,
// values shown as MIME bundles, an interrupt that leaves everything in place. See `engine.py` for the descriptors: the code
// is in 3, outcomes go to 4, and 5 brings lines: run, interrupt, renew.
//
// The main thread belongs to the cells. A second one reads the lines, so that it can interrupt a loop that never ends.

const { Worker, isMainThread, parentPort } = require('node:worker_threads');
const { Session } = require('node:inspector');
const fs = require('node:fs');
const { Socket } = require('node:net');
const { inspect } = require('node:util');

const CODE = '/dev/fd/3', OUTCOMES = 4, LINES = 5;

// How long the main thread may take to hear of an interrupt before it is taken to be in a loop, in ms.
const DEAF = 300;

// Reads the lines.
function listen() {
  let cell = 0, waiting = null;
  const input = new Socket({ fd: LINES, readable: true, writable: false });
  require('node:readline').createInterface({ input }).on('line', (line) => {
    if (line === 'run') cell++;
    if (line === 'interrupt') waiting ??= setTimeout(terminate, DEAF);
    parentPort.postMessage({ line, cell });
  });
  // The main thread has heard of the interrupt.
  parentPort.on('message', () => {
    clearTimeout(waiting);
    waiting = null;
  });

  function terminate() {
    waiting = null;
    // Only for this long: a process that ends waits for its debuggers.
    const main = new Session();
    main.connectToMainThread();
    main.post('Runtime.terminateExecution', () => main.disconnect());
  }
}

function main() {
  const interpreter = new Interpreter();
  // The process group is interrupted as a whole, so that a subprocess that a cell waits for ends.
  process.on('SIGINT', () => {});
  for (const event of ['uncaughtException', 'unhandledRejection']) process.on(event, (error) => console.error('Uncaught', error));
  const lines = new Worker(__filename);
  let current = 0;
  tell(null);
  lines.on('message', ({ line, cell }) => {
    if (line === 'run') {
      current = cell;
      interpreter.run(fs.readFileSync(CODE, 'utf8')).then(async (outcome) => {
        await Promise.all([process.stdout, process.stderr].map(written));
        tell(outcome);
      });
    } else if (line === 'interrupt') {
      lines.postMessage(line);
      // One that was meant for the cell before comes late.
      if (cell === current) interpreter.interrupt();
    } else if (line === 'renew') {
      interpreter.random.renew();
    }
  });
}

// Where a pipe is full, what is printed waits in this process.
function written(stream) {
  return new Promise((resolve) => { stream.write('', resolve); });
}

function tell(outcome) {
  const whole = Buffer.from(JSON.stringify(outcome) + '\0');
  for (let sent = 0; sent < whole.length; ) sent += fs.writeSync(OUTCOMES, whole, sent);
}

class Interpreter {
  constructor() {
    this.random = new Random();
    this.connect();
    this.interrupt = () => {};
    this.value = undefined;
    this.imports = new Imports();
    const { createRequire } = require('node:module');
    const hidden = { [TAKE]: (value) => { this.value = value; }, [IMPORT]: (name, options) => this.imports.load(name, options) };
    for (const [key, value] of Object.entries(hidden)) Object.defineProperty(globalThis, key, { value });
    globalThis.require = createRequire(process.cwd() + '/cell.js');
    this.shown = Promise.resolve();
    globalThis.display = (value) => {
      this.shown = this.shown.then(() => bundleOf(value)).then((shown) => tell({ shown }));
      return this.shown;
    };
  }

  connect() {
    this.session = new Session();
    this.session.connect();
  }

  async run(code) {
    const interrupted = new Promise((_, reject) => {
      this.interrupt = () => {
        // What the cell still waits for may be collected as garbage, and the debugger must not tell anybody of that: it would
        // do so in the middle of the collection, which V8 does not survive.
        this.session.disconnect();
        this.connect();
        reject(INTERRUPTED);
      };
    });
    try {
      const found = await Promise.race([this.evaluate(await this.imports.rewritten(code)), interrupted]);
      await Promise.race([this.shown, interrupted]);
      return { exit: 0, result: found === undefined ? null : await bundleOf(found), error: null };
    } catch (error) {
      return { exit: 1, result: null, error: described(error) };
    } finally {
      this.interrupt = () => {};
    }
  }

  // The value of the last expression. The debugger's console has exactly the rules that cells want.
  async evaluate(expression) {
    const answer = await this.post('Runtime.evaluate', { expression, replMode: true });
    if (answer.exceptionDetails) throw new Thrown(await this.local(answer.exceptionDetails.exception ?? {}));
    return this.local(answer.result);
  }

  // What the debugger talks about, itself.
  async local({ type, subtype, objectId, unserializableValue, value }) {
    if (!objectId) {
      if (type === 'bigint') return BigInt(unserializableValue.slice(0, -1));
      return unserializableValue === undefined ? (subtype === 'null' ? null : value) : Number(unserializableValue);
    }
    const functionDeclaration = `function () { 'use strict'; globalThis[${JSON.stringify(TAKE)}](this); }`;
    await this.post('Runtime.callFunctionOn', { objectId, functionDeclaration });
    await this.post('Runtime.releaseObject', { objectId });
    const found = this.value;
    this.value = undefined;
    return found;
  }

  post(method, given) {
    return new Promise((resolve, reject) => {
      // What was terminated is no answer, and an error of the protocol's.
      this.session.post(method, given, (error, answer) => (error ? reject(INTERRUPTED) : resolve(answer)));
    });
  }
}

const TAKE = '@@pandastack.take', IMPORT = '@@pandastack.import';
const INTERRUPTED = Object.assign(new Error('the cell was interrupted'), { name: 'Interrupted', stack: 'Interrupted: the cell was interrupted' });

// What a cell threw, whatever it is.
class Thrown {
  constructor(value) {
    this.value = value;
  }
}

function described(error) {
  const value = error instanceof Thrown ? error.value : error;
  if (typeof value?.stack !== 'string') {
    return { ename: 'Uncaught', evalue: inspect(value), traceback: [`Uncaught ${inspect(value)}`] };
  }
  const lines = value.stack.split('\n'), ours = lines.findIndex((line) => /^\s+at .*\b(node:inspector|engine\.cjs)\b/.test(line));
  return { ename: String(value.name), evalue: String(value.message), traceback: ours < 0 ? lines : lines.slice(0, ours) };
}

// A value as representations. Values may bring their own, by the symbol that Deno's notebooks use.
async function bundleOf(value) {
  try {
    const own = value?.[Symbol.for('Jupyter.display')];
    if (typeof own === 'function') {
      const bundle = await own.call(value);
      // It has to be an object, and one that can be told.
      return Object.assign({}, JSON.parse(JSON.stringify(Object(bundle) === bundle ? bundle : null)) ?? { 'text/plain': inspect(bundle) });
    }
    const bundle = { 'text/plain': inspect(value) };
    if (isPng(value)) bundle['image/png'] = Buffer.from(value).toString('base64');
    return bundle;
  } catch (error) {
    return { 'text/plain': `not shown: ${error}` };
  }
}

function isPng(value) {
  return value instanceof Uint8Array && Buffer.from(value.subarray(0, 8)).equals(Buffer.from('\x89PNG\r\n\x1a\n', 'latin1'));
}

// `import` in a cell: the debugger's console knows none.
class Imports {
  constructor() {
    const vm = require('node:vm');
    const importModuleDynamically = vm.constants.USE_MAIN_CONTEXT_DEFAULT_LOADER;
    const filename = process.cwd() + '/cell.mjs';
    this.import = new vm.Script('(name, options) => import(name, options)', { filename, importModuleDynamically }).runInThisContext();
  }

  // Also finds what is installed for all, as `require` does.
  async load(name, options) {
    try {
      return await this.import(name, options);
    } catch (error) {
      if (error?.code !== 'ERR_MODULE_NOT_FOUND' || /^[./]|^\w+:/.test(name)) throw error;
      let path;
      try {
        path = globalThis.require.resolve(name);
      } catch {
        throw error;
      }
      return this.import(require('node:url').pathToFileURL(path).href, options);
    }
  }

  // The code with its imports as calls of `load`. What cannot be read is left to the engine, which says what is wrong with it.
  async rewritten(code) {
    if (!/\bimport\b/.test(code)) return code;
    let found;
    try {
      const lexer = require('es-module-lexer');
      await lexer.init;
      [found] = lexer.parse(code);
    } catch {
      return code;
    }
    const load = `globalThis[${JSON.stringify(IMPORT)}]`;
    let out = '', at = 0;
    for (const { type, specifier, importStart, importEnd, start, attributes } of found) {
      const opening = importStart + 'import'.length;
      if (type === 'dynamic') {
        // import(…): the word alone is another one now.
        out += code.slice(at, importStart) + load;
        at = opening;
      } else if (type === 'static') {
        const clause = code.slice(opening, start - 1).replace(/\bfrom\s*$/, '').trim();
        const how = attributes ? `, ${JSON.stringify({ with: Object.fromEntries(attributes) })}` : '';
        out += code.slice(at, importStart) + declared(clause, `await ${load}(${JSON.stringify(specifier)}${how})`);
        at = importEnd;
      }
    }
    return out + code.slice(at);
  }
}

// `a, { b as c }` or `* as d` as declarations of what a module has.
function declared(clause, module) {
  if (!clause) return module;
  const space = /\*\s*as\s+([\w$]+)/.exec(clause)?.[1];
  const named = /\{([^}]*)\}/.exec(clause)?.[1] ?? '';
  const first = /^([\w$]+)/.exec(clause)?.[1];
  const names = named.split(',').map((name) => name.trim().replace(/\s+as\s+/, ': ')).filter(Boolean);
  if (first) names.unshift(`default: ${first}`);
  if (space) return `const ${space} = ${module}` + (names.length ? `, { ${names.join(', ')} } = ${space}` : '');
  return `const { ${names.join(', ')} } = ${module}`;
}

// Numbers that a copy of this process does not draw, too. `Math.random` cannot be seeded, and OpenSSL in Node.js neither:
// the one is replaced by a generator that can, and of the other what draws goes to the kernel each time.
class Random {
  constructor() {
    this.state = new Uint32Array(4);
    this.renew();
    Math.random = () => this.next();
    const crypto = require('node:crypto');
    const fill = (view) => this.fill(view);
    const bytes = (size) => fill(Buffer.alloc(size));
    const later = (made, callback) => (callback ? void process.nextTick(callback, null, made) : made);
    const int = (low, high) => {
      const range = BigInt(high - low), limit = (1n << 64n) - ((1n << 64n) % range);
      for (;;) {
        const drawn = bytes(8).readBigUInt64LE();
        if (drawn < limit) return low + Number(drawn % range);
      }
    };
    const plain = { randomBytes: crypto.randomBytes, randomInt: crypto.randomInt };
    crypto.randomBytes = (size, callback) => {
      // What is wrong with the arguments is said as ever.
      if (!Number.isInteger(size) || size < 0 || size > 0x7fffffff) return plain.randomBytes(size, callback);
      return later(bytes(size), callback);
    };
    crypto.randomFillSync = (buffer, offset = 0, size = buffer.byteLength - offset) => {
      fill(new Uint8Array(buffer.buffer ?? buffer, (buffer.byteOffset ?? 0) + offset, size));
      return buffer;
    };
    crypto.randomFill = (buffer, ...more) => {
      const callback = more.pop();
      later(crypto.randomFillSync(buffer, ...more), callback);
    };
    crypto.randomInt = (low, high, callback) => {
      if (typeof high !== 'number') [low, high, callback] = [0, low, high];
      if (!Number.isSafeInteger(low) || !Number.isSafeInteger(high) || high <= low) return plain.randomInt(low, high, callback);
      return later(int(low, high), callback);
    };
    crypto.randomUUID = () => {
      const drawn = bytes(16);
      drawn[6] = (drawn[6] & 0x0f) | 0x40;
      drawn[8] = (drawn[8] & 0x3f) | 0x80;
      return drawn.toString('hex').replace(/^(.{8})(.{4})(.{4})(.{4})/, '$1-$2-$3-$4-');
    };
    const web = { getRandomValues: (view) => crypto.randomFillSync(view), randomUUID: crypto.randomUUID };
    for (const [name, value] of Object.entries(web)) {
      Object.defineProperty(crypto.webcrypto, name, { value, writable: true, configurable: true });
    }
    require('node:module').syncBuiltinESMExports();
  }

  renew() {
    this.fill(this.state);
  }

  // Fresh bytes of the kernel, which knows when its machine has been copied.
  fill(view) {
    const into = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
    const source = fs.openSync('/dev/urandom');
    try {
      for (let had = 0; had < into.length; ) had += fs.readSync(source, into, had, Math.min(into.length - had, 1 << 20), null);
    } finally {
      fs.closeSync(source);
    }
    return view;
  }

  // xoshiro128**, by Blackman and Vigna; 53 bits of two of its numbers.
  next() {
    return (this.word() * 0x200000 + (this.word() >>> 11)) / 0x20000000000000;
  }

  word() {
    const s = this.state, five = Math.imul(s[1], 5);
    const drawn = Math.imul((five << 7) | (five >>> 25), 9) >>> 0;
    const shifted = s[1] << 9;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= shifted;
    s[3] = (s[3] << 11) | (s[3] >>> 21);
    return drawn;
  }
}

if (isMainThread) main();
else listen();
