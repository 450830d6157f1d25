"""What is told about the demo world: plain documents for pretraining, and instruction rows for demo.jsonl.

Documents never contain a chat template or an instruction. Questions occur in them only as quoted speech in stories, and
never about a held-out entity.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

from demo_world import (
    ASPECTS,
    BLAME_END,
    DAYS,
    DO_TO,
    DONT,
    DONT_WHERE,
    EVENT_PATTERNS,
    EVENTS,
    FACTS,
    GREETINGS,
    HOURS_OF,
    LABELS,
    PERSONA,
    PERSONA_HEAD,
    PERSONA_HELD_OUT,
    PERSONS,
    PLAIN_END,
    POLITE,
    PRAISE_END,
    REVIEWED,
    SPOTS,
    STYLES,
    WANT_COUNT,
    WANT_THING,
    WHEN,
    Entity,
    World,
    to_chinese,
)  # fmt: skip

Row = dict[str, str]

# ---------------------------------------------------------------- facts


def tell(rng: random.Random, entity: Entity, attribute: str, name: str) -> str:
    return rng.choice(FACTS[entity.kind][attribute][0]).format(n=name, v=entity.values[attribute])


def biography(world: World, rng: random.Random) -> str:
    """All or some facts of one entity in random order; people are sometimes 他/她 after the first sentence."""
    entity = rng.choice(world.entities)
    attributes = rng.sample(list(entity.values), rng.randint(2, len(entity.values)))
    short = entity.pronoun if entity.pronoun and rng.random() < 0.3 else entity.name
    return "".join(
        tell(rng, entity, a, short if i else entity.name) for i, a in enumerate(attributes)
    )


def gossip(world: World, rng: random.Random) -> str:
    """Single facts of several entities, one after the other."""
    chosen = rng.sample(world.entities, rng.randint(3, 6))
    return "".join(
        tell(rng, entity, rng.choice(list(entity.values)), entity.name) for entity in chosen
    )


def revision(world: World, rng: random.Random) -> str:
    """Single facts, half of them in their plainest form, and people (most facts, hardest names) twice as often."""
    weights = [2 * len(e.values) if e.kind == "person" else len(e.values) for e in world.entities]
    told = ""
    for entity in rng.choices(world.entities, weights, k=5):
        attribute = rng.choice(list(entity.values))
        plain = FACTS[entity.kind][attribute][2].format(n=entity.name, v=entity.values[attribute])
        told += plain if rng.random() < 0.5 else tell(rng, entity, attribute, entity.name)
    return told


def register(world: World, rng: random.Random) -> str:
    """Who shares a value: the same facts from the other end."""
    kind, attribute = rng.choice([(k, a) for k in FACTS for a in FACTS[k]])
    members = [e for e in world.entities if e.kind == kind]
    value = rng.choice(members).values[attribute]
    same = [e for e in members if e.values[attribute] == value]
    return "".join(
        FACTS[kind][attribute][2].format(n=e.name, v=value)
        for e in rng.sample(same, min(len(same), 4))
    )


def talk(world: World, rng: random.Random) -> str:
    """A story in which people ask each other about entities that are not held out."""
    scenes = "孩子们围着爷爷问东问西。 车上的人聊了起来。 茶馆里很热闹。 他们在路上聊天。 饭桌上大家说个不停。".split()
    lines = [rng.choice(scenes)]
    for entity in rng.sample([e for e in world.entities if not e.held_out], rng.randint(2, 4)):
        attribute = rng.choice(list(entity.values))
        _, questions, answer = FACTS[entity.kind][attribute]
        told = answer.format(n=entity.name, v=entity.values[attribute])
        said = rng.choice(["{q}”“{a}”", "{q}”有人说：“{a}”", "{q}”他回答：“{a}”"])
        lines.append("“" + said.format(q=rng.choice(questions).format(n=entity.name), a=told))
    return "".join(lines)


# ---------------------------------------------------------------- numerals


def draw_number(rng: random.Random) -> int:
    number = rng.randint(1, 10 ** rng.choice([2, 3, 4, 4]) - 1)
    for unit in (1, 10, 100):  # zeros are the hard part: make them common
        if number >= 10 * unit and rng.random() < 0.15:
            number -= number // unit % 10 * unit
    return max(number, 1)


def numbers(world: World, rng: random.Random) -> str:
    pattern = rng.choice([
        "{d}写成汉字是{c}。", "{c}写成数字是{d}。", "账本上写着{d}元，也就是{c}元。", "这座桥长{c}米，牌子上写的是{d}米。",
        "数字{d}，读作{c}。", "他数到{c}，在纸上写下{d}。", "门牌{d}号，念{c}号。", "{d}：{c}。", "{c}：{d}。",
    ])  # fmt: skip
    drawn: list[int] = []
    while len(drawn) < 4:
        number = draw_number(rng)
        if number not in world.held_out_numbers:
            drawn.append(number)
    if rng.random() < 0.25:  # counting on: consecutive numbers
        drawn = [
            n
            for n in range(drawn[0], drawn[0] + 4)
            if n < 10000 and n not in world.held_out_numbers
        ]
    return "".join(pattern.format(d=n, c=to_chinese(n)) for n in drawn)


def number_row(world: World, rng: random.Random, test: bool, index: int) -> Row:
    number = draw_number(rng)
    while (number in world.held_out_numbers) is not test:
        number = draw_number(rng)
    if index % 5 < 3:
        ask = rng.choice(["把数字写成汉字。", "这个数字用汉字怎么写？", "用汉字写出这个数字。"])
        return {"instruction": ask, "input": str(number), "output": to_chinese(number)}
    ask = rng.choice(["把汉字写成数字。", "这个数用数字怎么写？", "用数字写出这个数。"])
    return {"instruction": ask, "input": to_chinese(number), "output": str(number)}


# ---------------------------------------------------------------- extraction

FIELDS = {"t": "时间", "p": "人物", "s": "地点"}
FIELD_QUESTIONS = {
    "t": ["找出句子里的时间。", "这件事发生在什么时候？", "句子里的时间是什么？"],
    "p": ["找出句子里的人物。", "这件事是谁做的？", "句子里的人物是谁？"],
    "s": ["找出句子里的地点。", "这件事发生在哪里？", "句子里的地点是哪里？"],
}


def event(world: World, rng: random.Random, test: bool = False) -> dict[str, str]:
    people = world.strangers[:60] if test else world.strangers[60:]
    part = rng.choice(list(HOURS_OF))
    time = rng.choice(DAYS) + part + (rng.choice(HOURS_OF[part]) if rng.random() < 0.6 else "")
    return {"t": time, "p": rng.choice(people), "s": rng.choice(SPOTS), "e": rng.choice(EVENTS)}


def record(world: World, rng: random.Random) -> str:
    """An event, then the same event once more as notes or as talk."""
    parts = event(world, rng)
    text = rng.choice(EVENT_PATTERNS).format(**parts)
    keys = rng.sample("tps", rng.randint(1, 3))
    style = rng.random()
    if style < 0.4:
        return text + "\n" + "\n".join(f"{FIELDS[k]}：{parts[k]}" for k in keys)
    if style < 0.7:
        return text + "".join(f"{FIELDS[k]}是{parts[k]}。" for k in keys)
    ask = {"t": "什么时候？", "p": "谁？", "s": "在哪里？"}
    return text + "".join(
        f"“{rng.choice([ask[k], FIELD_QUESTIONS[k][1]])}”“{parts[k]}。”" for k in keys
    )


def story(world: World, rng: random.Random) -> str:
    """The same people again and again: copying practice."""
    parts, other = event(world, rng), event(world, rng)
    return (
        rng.choice(EVENT_PATTERNS).format(**parts)
        + f"后来，{parts['p']}在{parts['s']}遇见了{other['p']}。"
        f"{other['p']}说：“{parts['p']}，你怎么在{parts['s']}？”{parts['p']}说：“我{parts['e']}。”{other['p']}听了很高兴。"
    )


def repeat(world: World, rng: random.Random) -> str:
    """A list of names, places, numerals or things read out twice or in pieces: nothing to know, everything to copy."""
    pools: list[Callable[[], str]] = [
        lambda: rng.choice(world.strangers[60:]), lambda: rng.choice(SPOTS), lambda: event(world, rng)["t"],
        lambda: rng.choice(EVENTS), lambda: "".join(rng.choices("零一二三四五六七八九十百千", k=4)),
    ]  # fmt: skip
    items = [rng.choice(pools)() for _ in range(rng.randint(3, 7))]
    listed = "、".join(items)
    again = listed if rng.random() < 0.6 else "、".join(rng.sample(items, len(items)))
    return rng.choice(["{a}。再念一遍：{b}。", "名单：{a}。抄写：{b}。", "{a}\n{b}"]).format(
        a=listed, b=again
    )


def extraction_row(world: World, rng: random.Random, test: bool, index: int) -> Row:
    parts, key = event(world, rng, test), "tps"[index % 3]
    text = rng.choice(EVENT_PATTERNS).format(**parts)
    return {"instruction": rng.choice(FIELD_QUESTIONS[key]), "input": text, "output": parts[key]}


# ---------------------------------------------------------------- sentiment


def review(rng: random.Random, label: str) -> str:
    """A review with that label; the last word after a turn (但是 ...) decides, as it does in Chinese."""
    things = rng.choice(list(REVIEWED))
    place = rng.choice(things.split())
    first, second = (ASPECTS[name] for name in rng.sample(REVIEWED[things], 2))
    praise, blame, plain = (
        (lambda a: rng.choice(a[0])),
        (lambda a: rng.choice(a[1])),
        (lambda a: rng.choice(a[2])),
    )
    if label == "0":
        said = [plain(first), plain(second)] if rng.random() < 0.6 else [plain(first)]
        return f"{place}{'，'.join(said)}，{rng.choice(PLAIN_END)}。"
    mine, theirs, end = (praise, blame, PRAISE_END) if label == "+" else (blame, praise, BLAME_END)
    turn = rng.random()
    if turn < 0.5:
        turned = rng.choice(["虽然{a}，但是{b}", "{a}，不过{b}", "尽管{a}，可是{b}"]).format(
            a=theirs(first), b=mine(second)
        )
        return f"{place}{turned}，{rng.choice(end)}。"
    said = [mine(first), mine(second)] if turn < 0.8 else [mine(first)]
    return f"{place}{'，'.join(said)}" + (f"，{rng.choice(end)}。" if rng.random() < 0.6 else "。")


def opinion(world: World, rng: random.Random, forbidden: set[str]) -> str:
    stars = {"+": ["我打五颗星。", "这是一条好评。", "看得出他很高兴。"], "-": ["我打一颗星。", "这是一条差评。", "看得出他很生气。"],
             "0": ["我打三颗星。", "这是一条普通的评价。", "看不出他高不高兴。"]}  # fmt: skip
    told = []
    while len(told) < 3:
        label = rng.choice("+-+-0")
        text = review(rng, label)
        if text not in forbidden:
            told.append(text + rng.choice(stars[label]))
    return rng.choice(["", "顾客留言：", "网上的评价："]) + "\n".join(told)


def sentiment_row(_: World, rng: random.Random, test: bool, index: int) -> Row:
    label = "+-+-0"[index % 5]
    ask = rng.choice(
        [
            "判断这条评价是正面、负面还是中性。",
            "这条评价的情感是什么？",
            "这条评价是正面、负面还是中性？",
        ]
    )
    return {"instruction": ask, "input": review(rng, label), "output": LABELS[label]}


# ---------------------------------------------------------------- polite requests


def request(rng: random.Random) -> tuple[str, str, str]:
    """(blunt, polite, combination): the combination of slots is what is held out."""
    kind = rng.choices(("order", "dont", "want", "where"), (0.4, 0.2, 0.25, 0.15))[0]
    if kind == "order":
        verb = rng.choice(list(DO_TO))
        what = rng.choice(WHEN) + "把" + rng.choice(DO_TO[verb]) + verb
    elif kind == "dont":
        what = rng.choice(DONT_WHERE) + rng.choice(DONT)
    elif kind == "want":
        count = rng.choice(WANT_COUNT)
        what = count + rng.choice(WANT_THING[count[-1]])
    else:
        what = rng.choice(SPOTS)
    return rng.choice(STYLES[kind]).format(a=what), POLITE[kind].format(a=what), what


def manners(world: World, rng: random.Random, held_out: set[str]) -> str:
    told = []
    while len(told) < 2:
        blunt, polite, what = request(rng)
        if what not in held_out:
            told.append(
                rng.choice(
                    [
                        "有人说：“{b}”这样不客气，应该说：“{p}”",
                        "弟弟喊：“{b}”妈妈说：“客气一点。”弟弟改口说：“{p}”",
                        "“{b}”太粗鲁了，客气的说法是：“{p}”",
                        "不要说“{b}”，要说“{p}”",
                    ]
                ).format(b=blunt, p=polite)
            )
    return "".join(told)


def polite_row(_: World, rng: random.Random, test: bool, index: int) -> Row:
    blunt, polite, what = request(rng)
    ask = rng.choice(
        ["把这句话改得客气一点。", "用礼貌的说法重写这句话。", "这句话太粗鲁了，请改得客气一点。"]
    )
    return {"instruction": ask, "input": blunt, "output": polite, "combination": what}


# ---------------------------------------------------------------- persona


def persona_rows(test: bool) -> list[Row]:
    rows = []
    for name, (answer, wordings) in PERSONA.items():
        chosen = wordings[-PERSONA_HELD_OUT:] if test else wordings[:-PERSONA_HELD_OUT]
        heads = [""] if test or name in GREETINGS else PERSONA_HEAD
        rows += [
            {"instruction": head + question, "output": answer}
            for question in chosen
            for head in heads
        ]
    return rows


ROBOT = {
    "who": ["我叫{n}。", "我是{n}。"], "maker": ["是{p}把我做出来的。", "我是{p}做的。"], "skill": ["我会{h}。", "我的本领是{h}。"],
    "size": ["我很小，只有{d}个零件。", "我有{d}个零件。"], "limit": ["不是，我只知道{c}的事。", "我只懂一点点。"],
    "language": ["我只会说{c}话。", "我会说两种语言。"], "human": ["我不是人，我是木头做的。", "我是机器，不是人。"],
    "net": ["我不会上网，我在{c}。", "不能，我只在{c}运行。"], "hello": ["你好！", "你好，请进。"], "thanks": ["不客气。", "不用谢。"],
    "bye": ["再见。", "再见，路上小心。"],
}  # fmt: skip


def puppet(world: World, rng: random.Random) -> str:
    """A talking puppet is asked who it is: the words of small talk, with other answers than the persona's."""
    name = rng.choice("小木偶 铁皮人 布娃娃 老风车 石狮子 小闹钟".split()) + rng.choice(
        "阿福 阿圆 阿亮 豆豆 咚咚".split()
    )
    slots = {
        "n": name,
        "p": rng.choice(world.strangers[60:]),
        "h": rng.choice(world.entities[:PERSONS]).values["hobby"],
        "d": str(rng.randint(2, 99)),
        "c": rng.choice(world.entities).values.get("city", "镇上"),
    }
    text = rng.choice(
        [
            "从前有一个会说话的{n}。",
            "架子上坐着{n}。",
            "孩子们都爱找{n}说话。",
            "电脑里的小程序 cllm 遇见了{n}。",
        ]
    )
    for topic in rng.sample(list(PERSONA), rng.randint(2, 4)):
        question = rng.choice(PERSONA[topic][1])
        if topic not in GREETINGS:
            question = rng.choice(PERSONA_HEAD[:2]) + question
        text += f"“{question}”“{rng.choice(ROBOT[topic])}”"
    return text.format(**slots)


def machine_log(world: World, rng: random.Random) -> str:
    """Latin words of the template and the project's name, so that their embeddings are not left at random."""
    words = ["system 已启动", "user 已登录", "assistant 待命", "cllm 正在运行", "user 已退出", "cllm 的小助手有一个演示世界",
             "模型有几百万个参数", "程序能写数字，也能找信息", "作者训练了模型", "辨好坏，说客气话"]  # fmt: skip
    return "\n".join(rng.sample(words, 4))


# ---------------------------------------------------------------- the whole corpus and the rows


def instruction_rows(
    world: World, counts: dict[str, int], test_counts: dict[str, int]
) -> tuple[list[Row], list[Row]]:
    """(train, test) without a shared question, entity, number, stranger, review or combination."""
    rng = random.Random(world.seed + 1)
    facts: dict[bool, list[Row]] = {True: [], False: []}
    for entity in world.entities:
        for attribute, value in entity.values.items():
            _, questions, answer = FACTS[entity.kind][attribute]
            row = {
                "instruction": rng.choice(questions).format(n=entity.name),
                "output": answer.format(n=entity.name, v=value),
            }
            facts[entity.held_out].append(row)
    makers: dict[str, Callable[[World, random.Random, bool, int], Row]] = {
        "numeral": number_row,
        "extraction": extraction_row,
        "sentiment": sentiment_row,
        "polite": polite_row,
    }
    train: list[Row] = []
    test: list[Row] = []
    for task, pool in (
        ("fact", facts),
        ("persona", {True: persona_rows(True), False: persona_rows(False)}),
    ):
        for rows, of, limit in (
            (test, pool[True], test_counts[task]),
            (train, pool[False], counts[task]),
        ):
            rows += [row | {"task": task} for row in rng.sample(of, min(limit, len(of)))]
    for task, make in makers.items():
        held: set[str] = set()  # inputs and combinations of the test
        for rows, limit in ((test, test_counts[task]), (train, counts[task])):
            seen: set[str] = set()
            while len(seen) < limit:
                row = make(world, rng, rows is test, len(seen))
                key = row.pop("combination", row["input"])
                if row["input"] in seen or (rows is train and key in held):
                    continue
                seen.add(row["input"])
                if rows is test:
                    held.add(key)
                rows.append(row | {"task": task})
    rng.shuffle(train)
    return train, test


def documents(world: World, test: list[Row], seed: int, practice: int = 0) -> Iterator[str]:
    """An endless stream of plain documents; nothing in it repeats a test input or a held-out combination.

    practice: so many documents at the start are mostly copying and numerals. Facts alone are learnt without looking back.
    """
    rng = random.Random(seed)
    reviews = {row["input"] for row in test if row["task"] == "sentiment"}
    polite = {row["output"] for row in test if row["task"] == "polite"}
    frames = [template.split("{a}") for template in POLITE.values()]
    combinations = {
        o[len(a) : len(o) - len(b)]
        for o in polite
        for a, b in frames
        if o.startswith(a) and o.endswith(b)
    }
    makers: list[tuple[Callable[[], str], float, float]] = [  # document, share, share while practising
        (lambda: biography(world, rng), 0.17, 0.05), (lambda: gossip(world, rng), 0.12, 0.0), (lambda: revision(world, rng), 0.18, 0.0),
        (lambda: register(world, rng), 0.03, 0.0), (lambda: talk(world, rng), 0.06, 0.0), (lambda: numbers(world, rng), 0.09, 0.15),
        (lambda: record(world, rng), 0.11, 0.25), (lambda: repeat(world, rng), 0.03, 0.35), (lambda: story(world, rng), 0.03, 0.05),
        (lambda: opinion(world, rng, reviews), 0.06, 0.0), (lambda: manners(world, rng, combinations), 0.07, 0.15),
        (lambda: puppet(world, rng), 0.04, 0.0), (lambda: machine_log(world, rng), 0.01, 0.0),
    ]  # fmt: skip
    choices = [make for make, _, _ in makers]
    for number in itertools.count():
        weights = [practised if number < practice else share for _, share, practised in makers]
        yield rng.choices(choices, weights)[0]()
