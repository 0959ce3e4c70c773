"""Words, numerals, dates, people and log lines that the demo tasks and the demo corpus are made of."""

from __future__ import annotations

import random
from dataclasses import dataclass

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
CHINESE_DIGITS = "零一二三四五六七八九"
FIRST_NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jack", "Karen", "Leo", "Maria",
    "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Yusuf", "Zoe", "Omar", "Lena", "Ivan",
    "Nina", "Peter", "Lucy", "Tom",
)  # fmt: skip
LAST_NAMES = (
    "Adams", "Baker", "Cohen", "Diaz", "Evans", "Fischer", "Garcia", "Hall", "Ito", "Jones", "Khan", "Lopez",
    "Meyer", "Novak", "Owens", "Park", "Reed", "Silva", "Tanaka", "Weber", "Young", "Zhang", "Rossi", "Smith",
    "Moore", "Clark", "Brown", "Green", "Stone", "Wood",
)  # fmt: skip
CITIES = (
    "Athens", "Berlin", "Cairo", "Dublin", "Geneva", "Hanoi", "Kyoto", "Lima", "Lisbon", "London", "Madrid",
    "Milan", "Nairobi", "Oslo", "Paris", "Prague", "Quito", "Rome", "Seoul", "Sydney", "Tokyo", "Turin", "Vienna",
    "Warsaw", "Zurich", "Boston", "Chicago", "Denver", "Dallas", "Toronto",
)  # fmt: skip
LOG_WORDS = ("mail", "web", "auth", "cron", "proxy", "store", "queue", "index")
HOSTS = ("site", "corp", "lab", "shop", "bank", "home")
ENDINGS = ("com", "org", "net", "io")


def number_words(value: int) -> str:
    """English words of 0..999,999: 412305 -> four hundred twelve thousand three hundred five."""
    if value < 20:
        return UNITS[value]
    if value < 100:
        return TENS[value // 10] + (f"-{UNITS[value % 10]}" if value % 10 else "")
    if value < 1000:
        return f"{UNITS[value // 100]} hundred" + (f" {number_words(value % 100)}" if value % 100 else "")
    return f"{number_words(value // 1000)} thousand" + (f" {number_words(value % 1000)}" if value % 1000 else "")


def _chinese_group(value: int) -> str:
    """Chinese numerals of 0..9999; a run of zeros between two digits is one 零."""
    text, gap = "", False
    for power, unit in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = value // power % 10
        if digit:
            text += ("零" if gap else "") + CHINESE_DIGITS[digit] + unit
        gap = digit == 0 and bool(text)
    return text


def chinese_numeral(value: int) -> str:
    """Chinese numerals of 0..99,999,999: 412305 -> 四十一万二千三百零五."""
    if value == 0:
        return CHINESE_DIGITS[0]
    high, low = divmod(value, 10_000)
    gap = "零" if high and 0 < low < 1000 else ""
    text = (f"{_chinese_group(high)}万" if high else "") + gap + _chinese_group(low)
    return text.removeprefix("一") if text.startswith("一十") else text


def draw_number(rng: random.Random, largest_digits: int = 6) -> int:
    """A number whose count of digits is spread evenly from two up, with zeros more frequent than by chance."""
    digits = rng.randint(2, largest_digits)
    tail = ("0" if rng.random() < 0.2 else rng.choice("0123456789") for _ in range(digits - 1))
    return int(str(rng.randint(1, 9)) + "".join(tail))


@dataclass(frozen=True)
class Date:
    """A calendar date; days stop at 28 so that every drawn date exists."""

    year: int
    month: int
    day: int


def draw_date(rng: random.Random) -> Date:
    """A date between 1950 and 2049."""
    return Date(rng.randint(1950, 2049), rng.randint(1, 12), rng.randint(1, 28))


def ordinal(day: int) -> str:
    """1 -> 1st, 12 -> 12th."""
    suffix = "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


def write_date(rng: random.Random, date: Date) -> str:
    """One of the free ways in which people write a date."""
    month = MONTHS[date.month - 1]
    short = month[:3]
    return rng.choice((
        f"{date.day} {month} {date.year}",
        f"{month} {date.day}, {date.year}",
        f"the {ordinal(date.day)} of {month} {date.year}",
        f"{short} {date.day} {date.year}",
        f"{date.day} {short} {date.year}",
        f"{month} {ordinal(date.day)}, {date.year}",
        f"{rng.choice(WEEKDAYS)}, {date.day} {month} {date.year}",
        f"{rng.choice(WEEKDAYS)}, {short} {date.day}, {date.year}",
    ))  # fmt: skip


@dataclass(frozen=True)
class Person:
    """The facts in one record."""

    name: str
    age: int
    city: str


def draw_person(rng: random.Random) -> Person:
    """A person with a first name, a family name, an age and a city."""
    return Person(f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}", rng.randint(18, 90), rng.choice(CITIES))


def write_person(rng: random.Random, person: Person) -> str:
    """One sentence that holds the three facts, in one of several orders."""
    name, age, city = person.name, person.age, person.city
    return rng.choice((
        f"{name} is {age} years old and lives in {city}.",
        f"{name}, {age}, lives in {city}.",
        f"{name} from {city} is {age}.",
        f"In {city} lives {name}, aged {age}.",
        f"At {age}, {name} moved to {city}.",
        f"{city} is the home of {name} ({age}).",
    ))  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A stretch of a log line; `kind` is empty for plain text, else user, ip, email or token."""

    text: str
    kind: str = ""


def _draw_secret(rng: random.Random, kind: str) -> Piece:
    """A random value of the kind that must not reach a public log."""
    user = rng.choice((rng.choice(FIRST_NAMES).lower(), rng.choice(LAST_NAMES).lower() + str(rng.randint(1, 99))))
    if kind == "user":
        return Piece(user, kind)
    if kind == "ip":
        return Piece(".".join(str(rng.randint(1, 254)) for _ in range(4)), kind)
    if kind == "email":
        return Piece(f"{user}@{rng.choice(HOSTS)}.{rng.choice(ENDINGS)}", kind)
    return Piece("".join(rng.choice("0123456789abcdef") for _ in range(8)), kind)


def draw_log_line(rng: random.Random) -> tuple[Piece, ...]:
    """A log line as pieces: a clock time, a service and one or two values that need hiding."""
    clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    start = f"{clock} {rng.choice(LOG_WORDS)}: "
    template = rng.choice((
        "login ok for {user} from {ip}", "login failed for {user} from {ip}", "connection from {ip} closed",
        "{ip} sent {count} bytes", "mail to {email} sent", "mail from {email} refused", "user {user} logged out",
        "token={token} accepted for {user}", "token={token} expired", "user={user} ip={ip} status={count}",
        "reset link sent to {email}", "new session {token} from {ip}", "{user} changed {count} files",
    ))  # fmt: skip
    pieces = [Piece(start)]
    for chunk in template.split("{"):
        kind, closed, rest = chunk.partition("}")
        if not closed:
            pieces.append(Piece(chunk))
            continue
        pieces.append(Piece(str(rng.randint(2, 999))) if kind == "count" else _draw_secret(rng, kind))
        pieces.append(Piece(rest))
    return tuple(piece for piece in pieces if piece.text)


def render(pieces: tuple[Piece, ...]) -> str:
    """The log line as it was written."""
    return "".join(piece.text for piece in pieces)
