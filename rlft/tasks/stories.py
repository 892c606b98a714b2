"""The English of the arithmetic task: what its word problems are told with.

A problem is an opening, up to three events and a question. Each of these has wordings
that training may see and wordings held out for `ood_templates`; the held-out ones use
no word that training has not seen, so that what they test is the wording.

Slots: {n} the hero with {he} {He} {him}; {m} {o} {f} {g} other people, never of the
hero's sex, so that a pronoun always means the hero; {g} stands in questions only, so
that nobody is asked about who gave or took; {x} the things; {a} {b} {c} operands;
{k} {l} factors; {d} the number of an event. All numbers are at least 2, so that
plurals are right.
"""

from __future__ import annotations

HE = ("Tom", "Sam", "Ben", "Leo", "Max", "Dan", "Jack", "Omar")
SHE = ("Ann", "Mia", "Zoe", "Eva", "Lily", "Ruth", "Nina", "Sara")

_FRUIT = ("apples", "pears", "plums", "lemons", "peaches")
_BAKED = ("cookies", "muffins", "rolls", "pies")
_TOYS = ("marbles", "stickers", "cards", "beads", "buttons", "stamps", "coins", "pens")
THINGS = {
  "fruit": _FRUIT,
  "baked": _BAKED,
  "toys": _TOYS,
  "food": _FRUIT + _BAKED,
  "any": _FRUIT + _BAKED + _TOYS,
}

# Each opening: (what it may be told of, its text).
OPENINGS = {
  "seen": {
    "a+b": (
      ("any", "{n} has {a} big {x} and {b} small {x}."),
      ("toys", "{n} has {a} red {x} and {b} blue {x}."),
      ("fruit", "{n} picks {a} {x} on Monday and {b} {x} on Tuesday."),
      ("baked", "{n} bakes {a} {x} in the morning and {b} {x} in the evening."),
      ("any", "{n} buys {a} {x} at one shop and {b} {x} at another shop."),
      ("any", "{n} gets {a} {x} from {m} and {b} {x} from {o}."),
      ("toys", "{n} finds {a} {x} at home and {b} {x} at school."),
      ("toys", "{n} keeps {a} {x} in a box and {b} {x} on a shelf."),
      ("any", "{m} gives {n} {a} {x}. {o} gives {him} {b} {x}."),
      ("any", "{n} puts {a} {x} in one bag and {b} {x} in another bag."),
      (
        "any",
        "There are {a} {x} on the table and {b} {x} on the shelf. {n} takes all of"
        " them.",
      ),
    ),
    "a+b+c": (
      ("any", "{n} has {a} {x} in a box, {b} {x} in a bag and {c} {x} on the table."),
      ("toys", "{n} has {a} red {x}, {b} blue {x} and {c} green {x}."),
      (
        "fruit",
        "{n} picks {a} {x} on Monday, {b} {x} on Tuesday and {c} {x} on Friday.",
      ),
      (
        "baked",
        "{n} bakes {a} {x} in the morning, {b} {x} at noon and {c} {x} in the evening.",
      ),
      (
        "any",
        "{n} buys {a} {x} at one shop, {b} {x} at another shop and {c} {x} at the"
        " market.",
      ),
      ("any", "{n} gets {a} {x} from {m}, {b} {x} from {o} and {c} {x} from {f}."),
      (
        "toys",
        "{n} finds {a} {x} at home, {b} {x} at school and {c} {x} in the garden.",
      ),
      ("toys", "{n} keeps {a} {x} in a box, {b} {x} on a shelf and {c} {x} in a bag."),
      (
        "any",
        "{m} gives {n} {a} {x}, {o} gives {him} {b} {x} and {f} gives {him} {c} {x}.",
      ),
      (
        "any",
        "There are {a} {x} on the table, {b} {x} on the shelf and {c} {x} in the box."
        " {n} takes all of them.",
      ),
      (
        "fruit",
        "{n} picks {a} {x} from one tree, {b} {x} from another tree and {c} {x} from"
        " a small tree.",
      ),
    ),
    "k*a": (
      ("any", "{n} fills {k} bags with {a} {x} in each bag."),
      ("any", "{n} has {k} boxes. Each box holds {a} {x}."),
      ("fruit", "{n} picks {a} {x} from each of {k} trees."),
      ("baked", "{n} bakes {k} trays with {a} {x} on each tray."),
      ("any", "{n} buys {k} packs of {a} {x}."),
      ("any", "{n} gets {a} {x} each day for {k} days."),
      ("toys", "{n} has {k} shelves with {a} {x} on each shelf."),
      ("any", "Each of {k} friends gives {n} {a} {x}."),
      ("food", "{n} puts {a} {x} on each of {k} plates."),
      ("any", "There are {a} {x} in each of {k} rooms. {n} takes all of them."),
      ("any", "{n} brings {k} baskets home. There are {a} {x} in each basket."),
    ),
    "(a+b)*k": (
      ("any", "{n} fills {k} bags. Each bag gets {a} big {x} and {b} small {x}."),
      ("toys", "{n} has {k} boxes with {a} red {x} and {b} blue {x} in each box."),
      ("fruit", "{n} picks {a} big {x} and {b} small {x} from each of {k} trees."),
      (
        "baked",
        "For {k} days, {n} bakes {a} {x} each morning and {b} {x} each evening.",
      ),
      (
        "any",
        "Each week for {k} weeks, {n} buys {a} {x} on Monday and {b} {x} on Friday.",
      ),
      ("any", "{n} gets {a} {x} from {m} and {b} {x} from {o} each day for {k} days."),
      (
        "any",
        "{n} buys {k} packs. There are {a} big {x} and {b} small {x} in each pack.",
      ),
      ("toys", "In each of {k} rooms {n} finds {a} red {x} and {b} green {x}."),
      ("food", "{n} puts {a} big {x} and {b} small {x} on each of {k} plates."),
      (
        "any",
        "Each of {k} friends gives {n} {a} {x} on Monday and {b} {x} on Tuesday.",
      ),
      ("baked", "{n} bakes {k} trays. Each tray has {a} big {x} and {b} small {x}."),
    ),
    "k*a+b": (
      ("any", "{n} has {k} bags of {a} {x} and {b} more {x} on the table."),
      ("any", "{n} buys {k} packs of {a} {x} and {b} single {x}."),
      (
        "fruit",
        "{n} picks {a} {x} from each of {k} trees and {b} {x} from a small tree.",
      ),
      ("baked", "{n} bakes {k} trays of {a} {x} and then {b} more {x}."),
      (
        "toys",
        "{n} has {k} shelves with {a} {x} on each shelf and {b} {x} in a box.",
      ),
      ("any", "{n} gets {a} {x} each day for {k} days and then {b} {x} on Sunday."),
      ("any", "Each of {k} friends gives {n} {a} {x}, and {m} gives {him} {b} {x}."),
      ("any", "{n} fills {k} boxes with {a} {x} each and has {b} {x} left over."),
      ("food", "{n} puts {a} {x} on each of {k} plates and {b} {x} in a bag."),
      ("any", "{n} brings {k} baskets with {a} {x} each and a bag with {b} {x}."),
      (
        "any",
        "There are {a} {x} in each of {k} rooms and {b} {x} in the garden. {n} takes"
        " all of them.",
      ),
    ),
    "k*a+l*b": (
      ("any", "{n} has {k} bags with {a} {x} each and {l} boxes with {b} {x} each."),
      ("any", "{n} buys {k} small packs of {a} {x} and {l} big packs of {b} {x}."),
      (
        "fruit",
        "{n} picks {a} {x} from each of {k} small trees and {b} {x} from each of {l}"
        " big trees.",
      ),
      (
        "baked",
        "{n} bakes {k} trays of {a} {x} in the morning and {l} trays of {b} {x} in"
        " the evening.",
      ),
      (
        "any",
        "{n} gets {a} {x} each day for {k} days and then {b} {x} each day for {l}"
        " days.",
      ),
      (
        "toys",
        "{n} has {k} shelves with {a} {x} on each shelf and {l} boxes with {b} {x} in"
        " each box.",
      ),
      (
        "any",
        "Each of {k} friends gives {n} {a} {x}, and each of {l} other friends gives"
        " {him} {b} {x}.",
      ),
      (
        "food",
        "{n} puts {a} {x} on each of {k} plates and {b} {x} in each of {l} bags.",
      ),
      (
        "any",
        "There are {a} {x} in each of {k} rooms and {b} {x} in each of {l} boxes."
        " {n} takes all of them.",
      ),
      (
        "any",
        "{n} brings {k} baskets with {a} {x} each and {l} bags with {b} {x} each.",
      ),
      (
        "any",
        "{m} gives {n} {k} bags of {a} {x}, and {o} gives {him} {l} bags of {b} {x}.",
      ),
    ),
  },
  "unseen": {
    "a+b": (
      ("any", "On Monday {n} buys {a} {x}, and on Tuesday {he} buys {b} more {x}."),
      ("any", "At home {n} has a box with {a} {x} and a bag with {b} {x}."),
      ("any", "{n} takes {a} {x} from one shelf and {b} {x} from another shelf."),
    ),
    "a+b+c": (
      (
        "any",
        "On Monday {n} buys {a} {x}. Then {he} buys {b} {x} on Tuesday and {c} {x} on"
        " Friday.",
      ),
      (
        "any",
        "At home {n} has a box with {a} {x}, a bag with {b} {x} and a basket with {c}"
        " {x}.",
      ),
      (
        "any",
        "{n} takes {a} {x} from one shelf, {b} {x} from another shelf and {c} {x}"
        " from the table.",
      ),
    ),
    "k*a": (
      ("any", "In each of {k} boxes {n} has {a} {x}."),
      ("any", "There are {k} baskets with {a} {x} each. {n} takes all of them."),
      ("any", "For {k} days {n} gets a bag of {a} {x} each day."),
    ),
    "(a+b)*k": (
      (
        "any",
        "There are {a} big {x} and {b} small {x} in each of {k} baskets. {n} takes"
        " all of them.",
      ),
      ("any", "For {k} weeks {n} gets {a} {x} each Monday and {b} {x} each Friday."),
      ("any", "{n} has {k} bags, each with {a} big {x} and {b} small {x}."),
    ),
    "k*a+b": (
      ("any", "{m} gives {n} {b} {x}. Then {n} buys {k} packs of {a} {x}."),
      ("any", "{n} has a bag with {b} {x} and {k} boxes with {a} {x} in each box."),
      (
        "any",
        "There are {b} {x} on the shelf and {a} {x} in each of {k} baskets. {n} takes"
        " all of them.",
      ),
    ),
    "k*a+l*b": (
      (
        "any",
        "{n} fills {k} bags with {a} {x} each. Then {he} fills {l} boxes with {b} {x}"
        " each.",
      ),
      (
        "any",
        "On Monday {n} buys {k} packs of {a} {x}, and on Friday {he} buys {l} packs"
        " of {b} {x}.",
      ),
      (
        "any",
        "For {k} weeks {n} gets {a} {x} each week, and then {b} {x} each week for {l}"
        " weeks.",
      ),
    ),
  },
}

EVENTS = {
  "seen": {
    "+": (
      "Then {he} buys {d} more {x}.",
      "Later {he} finds {d} more {x}.",
      "{f} gives {him} {d} more {x}.",
      "The next day {he} gets {d} more {x}.",
      "After lunch {he} gets {d} {x} from {m}.",
      "{m} brings {him} {d} {x}.",
      "Then {he} adds {d} {x}.",
      "{He} also has {d} {x} at home.",
      "On Sunday {he} gets {d} {x} as a gift.",
      "Then {o} comes and gives {him} {d} {x}.",
      "{He} wins {d} {x} in a game.",
    ),
    "-": (
      "{He} gives {d} {x} to {f}.",
      "Then {he} sells {d} {x}.",
      "{He} loses {d} of the {x}.",
      "{f} takes {d} of the {x}.",
      "Later {he} gives away {d} {x}.",
      "The next day {he} sells {d} of the {x}.",
      "{He} sends {d} {x} to {m}.",
      "Then {he} gives {o} {d} {x}.",
      "{m} asks for {d} {x} and gets them.",
      "On Sunday {he} gives {d} {x} to a friend.",
      "{He} brings {d} {x} to school and leaves them there.",
    ),
  },
  "unseen": {
    "+": (
      "Later {m} comes and brings {d} more {x}.",
      "{He} finds {d} {x} in a bag at home.",
      "On Friday {f} gives {him} {d} {x} as a gift.",
    ),
    "-": (
      "{He} sells {d} {x} to {f}.",
      "After lunch {he} gives away {d} of the {x}.",
      "Later {m} takes {d} {x} home.",
    ),
  },
}

# What is asked: of the whole (""), of a multiple of it, of a part of it.
QUESTIONS = {
  "seen": {
    "": (
      "How many {x} does {n} have now?",
      "How many {x} does {n} have in the end?",
      "How many {x} does {n} have at the end?",
      "How many {x} does {n} have after that?",
      "Now how many {x} does {n} have?",
      "In the end, how many {x} does {n} have?",
      "At the end, how many {x} does {n} have?",
      "What number of {x} does {n} have now?",
      "Find the number of {x} that {n} has now.",
      "Find how many {x} {n} has in the end.",
      "What is the number of {x} that {n} has in the end?",
    ),
    "*": (
      "{g} has {k} times as many {x} as {n} has now. How many {x} does {g} have?",
      "A shop has {k} times as many {x} as {n} has now. How many {x} does the shop"
      " have?",
      "{g} wants {k} times as many {x} as {n} has now. How many {x} does {g} want?",
      "Next week {he} needs {k} times as many {x} as {he} has now. How many {x} does"
      " {he} need?",
      "{He} sells all the {x} for {k} dollars each. How many dollars does {he} get?",
      "Each of the {x} is worth {k} dollars. How many dollars are all the {x} of {n}"
      " worth?",
      "At the school there are {k} times as many {x} as {n} has now. How many {x} are"
      " at the school?",
      "{He} wants to have {k} times as many {x} as {he} has now. How many {x} is that?",
      "The market has {k} times as many {x} as {n} has now. How many {x} are at the"
      " market?",
      "If {g} has {k} times as many {x} as {n} has now, how many {x} does {g} have?",
      "How many dollars does {n} get if {he} sells all the {x} for {k} dollars each?",
    ),
    "/": (
      "{He} shares all the {x} equally among {k} friends. How many {x} does each"
      " friend get?",
      "{He} puts all the {x} into {k} equal piles. How many {x} are in each pile?",
      "{He} packs all the {x} in bags of {k}. How many bags does {he} fill?",
      "{He} splits all the {x} equally between {k} boxes. How many {x} are in each"
      " box?",
      "Then {k} friends share all the {x} equally. How many {x} does each friend get?",
      "{He} uses {k} {x} for each gift. How many gifts can {he} make with all the {x}?",
      "{He} lays all the {x} in {k} equal rows. How many {x} are in each row?",
      "{He} lays all the {x} in rows of {k}. How many rows can {he} make?",
      "{He} sells all the {x} in packs of {k}. How many packs does {he} sell?",
      "If {n} gives away {k} {x} each day, how many days do the {x} last?",
      "How many {x} does each friend get if {k} friends share all the {x} equally?",
    ),
  },
  "unseen": {
    "": (
      "After that, how many {x} does {n} have?",
      "Find the number of {x} that {n} has at the end.",
      "What is the number of {x} that {n} has now?",
    ),
    "*": (
      "How many {x} does {g} have if {g} has {k} times as many {x} as {n} has now?",
      "{He} gets {k} dollars for each of the {x}. How many dollars is that?",
      "The school wants {k} times as many {x} as {n} has now. How many {x} is that?",
    ),
    "/": (
      "If {k} friends share all the {x} equally, how many {x} does each friend get?",
      "How many bags can {n} fill with all the {x} if {he} puts {k} {x} in each bag?",
      "How many packs of {k} {x} can {n} make with all the {x}?",
    ),
  },
}
