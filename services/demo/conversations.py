"""Conversations about Python made from docstrings, signatures and pydoc topics, read by `ast`. Knows nothing of tokens."""

import ast
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from services.demo.corpus import Document, Source, capped_sources, is_held_out, package_folder
from services.demo.recipe import CorpusRecipe, TokenizerRecipe

Message = Mapping[str, str]  # role, content


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented thing: a module, a class, a function, a method or a topic of the language reference."""

    file: str
    name: str
    short: str
    kind: str  # module | class | function | topic
    paragraphs: tuple[str, ...]
    signature: str = ""
    parameters: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    prose: str = ""


@dataclass(frozen=True, slots=True)
class Phrases:
    """The ways a question is put."""

    systems: tuple[str, ...] = (
        "You are a helpful assistant.",
        "You are a helpful assistant for Python programmers.",
        "You answer questions about Python briefly.",
        "Answer questions about Python and its libraries.",
    )
    what: tuple[str, ...] = (
        "What does `{}` do?",
        "What is `{}`?",
        "What is `{}` for?",
        "Explain `{}`.",
        "Explain `{}` in Python.",
        "Tell me about `{}`.",
        "Describe `{}`.",
        "What's the purpose of `{}`?",
        "Can you explain what `{}` does?",
        "How does `{}` work?",
        "I found `{}` in some code. What is it?",
        "In Python, what is `{}`?",
    )
    parameters: tuple[str, ...] = (
        "What are the parameters of `{}`?",
        "Which arguments does `{}` take?",
        "List the parameters of `{}`.",
        "What can I pass to `{}`?",
    )
    signature: tuple[str, ...] = (
        "Show the signature of `{}`.",
        "What is the signature of `{}`?",
        "How do I call `{}`?",
        "How is `{}` declared?",
    )
    methods: tuple[str, ...] = (
        "Which methods does `{}` have?",
        "List the methods of `{}`.",
        "What methods are there on `{}`?",
    )
    more: tuple[str, ...] = ("Tell me more.", "Go on.", "What else should I know?", "Can you say more about it?", "More details, please.")
    then_parameters: tuple[str, ...] = ("What are its parameters?", "And its parameters?", "Which arguments does it take?")
    then_signature: tuple[str, ...] = ("Show me the signature.", "And the signature?", "How do I call it?")
    then_methods: tuple[str, ...] = ("Which methods does it have?", "What can I do with it?", "And its methods?")
    greetings: tuple[tuple[str, str], ...] = (
        ("Hello!", "Hello! Ask me about a Python module, class or function."),
        ("Hi", "Hi! What would you like to know about Python?"),
        ("Hello, who are you?", "I am a small assistant that explains Python and its libraries."),
        ("Who are you?", "I am a small assistant that explains Python and its libraries."),
        ("What can you do?", "I can explain Python modules, classes and functions, and show their signatures and parameters."),
        ("Thank you!", "You are welcome."),
        ("Thanks", "You are welcome. Is there anything else you would like to know?"),
        ("Good morning", "Good morning! What would you like to know about Python?"),
    )


def chat_documents(recipe: CorpusRecipe, tokens: TokenizerRecipe) -> list[Document]:
    """Rendered conversations and docstring prose, shuffled; parts are `conversations` and `prose`."""
    entries = list(chat_entries(recipe))
    conversations = [
        Document(entry.file, "conversations", render(messages, tokens), is_held_out(entry.file, recipe))
        for entry in entries
        for messages in entry_conversations(entry, recipe)
    ]
    share = recipe.prose_share / (1 - recipe.prose_share)
    prose = some_prose(entries, recipe, int(share * sum(len(document.text) for document in conversations)))
    documents = [document for document in conversations + prose if not foreign_markers(document, tokens)]
    Random(recipe.seed).shuffle(documents)
    return documents


def foreign_markers(document: Document, tokens: TokenizerRecipe) -> bool:
    """Whether prose contains a special token's text."""
    return document.part == "prose" and any(marker in document.text for marker in tokens.specials)


def render(messages: list[Message], tokens: TokenizerRecipe) -> str:
    """The conversation as the chat template renders it, without the document marker."""
    return "".join(f"<|{message['role']}|>{message['content']}{tokens.end}" for message in messages)


def some_prose(entries: list[Entry], recipe: CorpusRecipe, characters: int) -> list[Document]:
    """Docstrings as they are written, in a random order until `characters` are reached."""
    shuffled = [entry for entry in entries if len(entry.prose) > 80]
    Random(recipe.seed + 1).shuffle(shuffled)
    documents: list[Document] = []
    for entry in shuffled:
        if characters <= 0:
            break
        characters -= len(entry.prose)
        documents.append(Document(entry.file, "prose", entry.prose, is_held_out(entry.file, recipe)))
    return documents


def chat_entries(recipe: CorpusRecipe) -> Iterator[Entry]:
    """Every entry whose explanation has not been seen before."""
    seen: set[tuple[str, ...]] = set()
    caps = {package.name: package.chat_bytes for package in recipe.packages}
    for source in capped_sources(recipe, caps):
        for entry in source_entries(source, recipe):
            if entry.paragraphs not in seen:
                seen.add(entry.paragraphs)
                yield entry
    yield from topic_entries(recipe)


def topic_entries(recipe: CorpusRecipe) -> Iterator[Entry]:
    """The topics of the language reference that `help()` shows; each counts as a file of its own."""
    folder = package_folder("stdlib")
    file = (folder or Path()) / "pydoc_data" / "topics.py"
    if not file.exists():
        return
    tree = ast.parse(file.read_text("utf-8"))
    literal = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    for topic, text in ast.literal_eval(literal).items():
        body = re.sub(r"\A.*\n[*=~-]{3,}\n+", "", text)
        for index, piece in enumerate(pieces(body, recipe.prose_length)):
            paragraphs = clean_paragraphs(piece)
            if paragraphs:
                file_name = f"stdlib/pydoc_data/topics/{topic}"
                yield Entry(file_name, topic, topic, "topic" if index == 0 else "aside", paragraphs, prose=piece)


def pieces(text: str, length: int) -> list[str]:
    """The text cut at blank lines into pieces of at most about `length` characters."""
    done: list[str] = [""]
    for paragraph in re.split(r"\n\n+", text.strip("\n")):
        if done[-1] and len(done[-1]) + len(paragraph) > length:
            done.append("")
        done[-1] += f"{paragraph}\n\n"
    return [piece.strip("\n") for piece in done]


def source_entries(source: Source, recipe: CorpusRecipe) -> Iterator[Entry]:
    """The documented public names of one file; nothing when it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source.text)
    except (SyntaxError, ValueError):
        return
    yield from node_entries(tree, source, module_name(source), "", recipe)


def module_name(source: Source) -> str:
    parts = [] if source.package == "stdlib" else [source.package]
    parts += source.path.removesuffix(".py").removesuffix("__init__").strip("/").split("/")
    return ".".join(part for part in parts if part)


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def node_entries(node: Documented, source: Source, name: str, owner: str, recipe: CorpusRecipe) -> Iterator[Entry]:
    """The entry of a node, then those of the public classes and functions directly inside it."""
    doc = ast.get_docstring(node, clean=True)
    paragraphs = clean_paragraphs(doc or "")
    if doc and paragraphs:
        yield described(node, source, name, owner, paragraphs, doc[: recipe.prose_length])
    if isinstance(node, ast.Module | ast.ClassDef):
        inner_owner = node.name if isinstance(node, ast.ClassDef) else name.rpartition(".")[2]
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
                yield from node_entries(child, source, f"{name}.{child.name}", inner_owner, recipe)


def described(node: Documented, source: Source, name: str, owner: str, paragraphs: tuple[str, ...], prose: str) -> Entry:
    """The entry of a documented node."""
    if isinstance(node, ast.Module):
        return Entry(source.name, name, name, "module", paragraphs, prose=prose)
    short = f"{owner}.{node.name}" if owner else node.name
    if isinstance(node, ast.ClassDef):
        methods = tuple(child.name for child in node.body if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"))
        return Entry(source.name, name, node.name, "class", paragraphs, methods=methods, prose=prose)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    signature = f"{'async ' * isinstance(node, ast.AsyncFunctionDef)}def {node.name}({ast.unparse(node.args)}){returns}"
    return Entry(source.name, name, short, "function", paragraphs, signature, parameters(node.args), prose=prose)


def parameters(arguments: ast.arguments) -> tuple[str, ...]:
    """Each parameter but self as one line of Markdown, with its annotation and its default."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    first = zip(positional, [*defaults, *arguments.defaults], strict=True)
    rest = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return tuple(parameter(argument, default) for argument, default in (*first, *rest) if argument.arg not in ("self", "cls"))


def parameter(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    suffix = f" (default `{ast.unparse(default)}`)" if default else ""
    return f"- `{argument.arg}{annotation}`{suffix}"


def clean_paragraphs(doc: str) -> tuple[str, ...]:
    """The leading paragraphs of plain sentences in a docstring, before its first section, example or directive."""
    kept: list[str] = []
    for paragraph in re.split(r"\n[ ]*\n+", inspect.cleandoc(doc)):
        if re.search(r">>>|^\s*\.\. |^[A-Z][A-Za-z ]*:\s*\n|^\s*:\w+|^[-=~*]{3,}\s*$|::=|\|\s|\+--|@|https?:", paragraph, re.MULTILINE):
            break
        if re.match(r"(Args|Arguments|Parameters|Returns|Examples?|Usage|Attributes|Notes?|Raises|Yields|See Also)\b.{0,3}$", paragraph):
            break
        kept.append(plain(paragraph))
    return tuple(kept) if kept and is_prose(kept[0]) else ()


def plain(paragraph: str) -> str:
    """One paragraph on one line, without reStructuredText roles."""
    text = re.sub(r":[\w:]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`", r"`\1`", paragraph)
    text = re.sub(r"``+", "`", text)
    if re.search(r"^\s*[-*] ", text, re.MULTILINE):
        return text.strip()
    return re.sub(r"\s+", " ", text).strip()


def is_prose(text: str) -> bool:
    """Whether the text is a sentence of ASCII words that can open an answer."""
    words = text.isascii() and len(text) >= 20 and text.count(" ") >= 3
    return words and text[0].isalnum() and sum(map(str.isalpha, text)) > 0.65 * len(text)


def answer(paragraphs: tuple[str, ...], length: int) -> tuple[str, int]:
    """As many whole paragraphs as fit in `length` characters, and their number; a long first one is cut after a sentence."""
    text, used = "", 0
    for paragraph in paragraphs:
        if len(text) + len(paragraph) + 2 > length:
            break
        text, used = f"{text}\n\n{paragraph}".strip(), used + 1
    if not used:
        cut = max(paragraphs[0].rfind(end, 0, length) for end in (". ", "! ", "? "))
        return (paragraphs[0][: cut + 1] if cut > 0 else ""), 1
    text = re.sub(r"\n\n[^\n]*:$", "", text)
    return (text if text.rstrip(")\"'")[-1:] in (".", "!", "?", "`") else text.rstrip(" :;,") + "."), used


def entry_conversations(entry: Entry, recipe: CorpusRecipe) -> list[list[Message]]:
    """The conversations about one entry; those of the standard library are told twice, in other words."""
    random = Random(f"{recipe.seed}:{entry.file}:{entry.name}:{entry.kind}")
    if entry.kind == "aside" or not answer(entry.paragraphs, recipe.answer_length)[0]:
        return []
    rounds = 2 if entry.file.startswith("stdlib/") else 1
    conversations = [conversation(entry, recipe, random, Phrases()) for _ in range(rounds)]
    if random.random() < 0.02:
        conversations.append(opening(random, Phrases()) + turn(*random.choice(Phrases().greetings)))
    return conversations


def conversation(entry: Entry, recipe: CorpusRecipe, random: Random, phrases: Phrases) -> list[Message]:
    """One to three turns about an entry."""
    name = entry.name if entry.file.startswith("stdlib/") or random.random() < 0.5 else entry.short
    turns = [*first_turns(entry, name, recipe, random, phrases)]
    count = random.choices((1, 2, 3), (5, 4, 2))[0]
    return opening(random, phrases) + [message for one in turns[:count] for message in one]


def first_turns(entry: Entry, name: str, recipe: CorpusRecipe, random: Random, phrases: Phrases) -> list[list[Message]]:
    """The turns an entry can give, in the order they are told."""
    text, used = answer(entry.paragraphs, recipe.answer_length)
    facts = facts_about(entry, name, random, phrases)
    if facts and random.random() < 0.3:
        question, _, reply = facts[0]
        return [turn(question.format(name), reply), turn(random.choice(("What does it do?", "What is it for?", "Explain it.")), text)]
    if facts and random.random() < 0.4:
        text, facts = f"{text}\n\n{facts[0][2]}", facts[1:]
    turns = [turn(random.choice(phrases.what).format(name), text)]
    rest = entry.paragraphs[used:]
    more = answer(rest, recipe.answer_length)[0] if rest and is_prose(rest[0]) else ""
    if more:
        turns.append(turn(random.choice(phrases.more), more))
    return turns + [turn(question, reply) for _, question, reply in facts]


def facts_about(entry: Entry, name: str, random: Random, phrases: Phrases) -> list[tuple[str, str, str]]:
    """(question, follow-up question, answer) for what the code itself says, in a random order."""
    facts = []
    if 1 <= len(entry.parameters) <= 8:
        listing = "\n".join(entry.parameters)
        facts.append((random.choice(phrases.parameters), random.choice(phrases.then_parameters), f"`{name}` takes:\n\n{listing}"))
    if entry.signature and len(entry.signature) < 300:
        block = f"```python\n{entry.signature}\n```"
        facts.append((random.choice(phrases.signature), random.choice(phrases.then_signature), block))
    if 1 <= len(entry.methods) <= 12:
        listing = ", ".join(f"`{method}`" for method in entry.methods)
        facts.append((random.choice(phrases.methods), random.choice(phrases.then_methods), f"`{name}` has these methods: {listing}."))
    random.shuffle(facts)
    return facts


def opening(random: Random, phrases: Phrases) -> list[Message]:
    """A system message, one time in four."""
    return [{"role": "system", "content": random.choice(phrases.systems)}] if random.random() < 0.25 else []


def turn(question: str, reply: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
