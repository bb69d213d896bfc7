// Messages that npm's parsers find in chat exports, as JSON: node npm_counts.cjs FOLDER_OF_NODE_MODULES FILE...
// A .txt file is a WhatsApp chat, a .json file a Telegram one. {"versions": {...}, "files": {name: {"all", "said", "by": {author: n}}}}
const fs = require("fs");
const path = require("path");

const [modules, ...files] = process.argv.slice(2);
const load = (name) => require(require.resolve(name, { paths: [modules] }));
const version = (name) => JSON.parse(fs.readFileSync(path.join(modules, name, "package.json"))).version;

function count(file) {
  const text = fs.readFileSync(file, "utf8");
  const messages = file.endsWith(".json")
    ? new (load("telegram-chat-parser").TelegramChat)(text).messages.map((m) => (m.isMessage ? (m.from ? m.from.name : "?") : null))
    : load("whatsapp-chat-parser").parseString(text).map((m) => m.author);
  const by = {};
  for (const author of messages) if (author !== null && author !== undefined) by[author] = (by[author] || 0) + 1;
  const said = Object.values(by).reduce((a, b) => a + b, 0);
  return { all: messages.length, said, by };
}

const names = ["whatsapp-chat-parser", "telegram-chat-parser"];
console.log(
  JSON.stringify({
    versions: Object.fromEntries(names.map((name) => [name, version(name)])),
    files: Object.fromEntries(files.map((file) => [path.basename(file), count(file)])),
  }),
);
