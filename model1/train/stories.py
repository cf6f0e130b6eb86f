"""Template stories told from a world state, and questions that the state answers.

Owns who is where and who holds what while a story is told. Knows nothing of tokens or of how
documents are mixed.
"""

import random
from dataclasses import dataclass, field

from model1.train import words


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    answer: str  # begins with a space, ends with a full stop


@dataclass(slots=True)
class World:
    """Every object is either carried by one person or lies at one place."""

    place_of: dict[str, str]
    lies_at: dict[str, str]
    colour_of: dict[str, str]
    carried_by: dict[str, str] = field(default_factory=dict)

    def object_place(self, thing: str) -> str:
        carrier = self.carried_by.get(thing)
        return self.lies_at[thing] if carrier is None else self.place_of[carrier]


class StoryTeller:
    """Tells one story: `opening`, then any number of `event`s and `question`s, then `closing`."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._people = rng.sample(words.PEOPLE, rng.choice((2, 2, 3, 3, 4)))
        self._places = rng.sample(words.PLACES, rng.choice((3, 4, 5)))
        things = rng.sample(words.OBJECTS, rng.choice((1, 2, 2, 3)))
        self._told: set[str] = set()  # only what the text has said may be asked
        self.world = World(
            place_of={p: rng.choice(self._places) for p in self._people},
            lies_at={t: rng.choice(self._places) for t in things},
            colour_of={t: rng.choice(words.COLOURS) for t in things},
        )

    def opening(self) -> str:
        rng, people = self._rng, self._people
        first, rest = people[0], people[1:]
        names = f"{', '.join(people[:-1])} and {people[-1]}"
        lines = [
            rng.choice(
                (
                    f"Once upon a time, {names} lived in {rng.choice(words.HOMES)}.",
                    f"There once was a {rng.choice(words.TRAITS)} {rng.choice(words.JOBS)} called "
                    f"{first}, who lived in {rng.choice(words.HOMES)} with {' and '.join(rest)}.",
                    f"{names} were good friends.",
                )
            )
        ]
        if rng.random() < 0.5:
            lines.append(rng.choice(words.WEATHER))
        if rng.random() < 0.4:
            lines.append(f"{rng.choice(people)} was {rng.choice(words.TRAITS)}.")
        for thing, place in self.world.lies_at.items():
            self._told.add(thing)
            lines.append(f"There was a {self.world.colour_of[thing]} {thing} in the {place}.")
        return " ".join(lines)

    def event(self) -> str:
        """Changes the world and says so."""
        world, rng = self.world, self._rng
        person = rng.choice(self._people)
        here = world.place_of[person]
        carried = [t for t, p in world.carried_by.items() if p == person]
        lying = [t for t, p in world.lies_at.items() if p == here]
        near = [p for p in self._people if p != person and world.place_of[p] == here]
        told = person in self._told
        self._told.add(person)
        if carried and near and all(p in self._told for p in near) and rng.random() < 0.4:
            thing, other = rng.choice(carried), rng.choice(near)
            world.carried_by[thing] = other
            return f"{person} gave the {thing} to {other}."
        if carried and told and rng.random() < 0.4:
            thing = rng.choice(carried)
            del world.carried_by[thing]
            world.lies_at[thing] = here
            verb = rng.choice(("left the {} in the {}", "put down the {} in the {}"))
            return f"{person} {verb.format(thing, here)}."
        if lying and told and rng.random() < 0.7:
            thing = rng.choice(lying)
            del world.lies_at[thing]
            world.carried_by[thing] = person
            return f"{person} {rng.choice(('picked up', 'took'))} the {thing}."
        place = rng.choice([p for p in self._places if p != here])
        world.place_of[person] = place
        verb = rng.choice(("went", "walked", "ran", "moved"))
        if carried and rng.random() < 0.7:
            return f"{person} carried the {rng.choice(carried)} to the {place}."
        return f"{person} {verb} to the {place}."

    def question(self) -> Question:
        """About something that the text so far determines."""
        world, rng = self.world, self._rng
        kind = rng.choice(("person", "person", "thing", "thing", "holder", "colour"))
        people = [p for p in self._people if p in self._told]
        things = [t for t in world.colour_of if t in self._told]
        if kind == "holder" and world.carried_by:
            thing = rng.choice(list(world.carried_by))
            return Question(f"Who has the {thing}?", f" {world.carried_by[thing]} has the {thing}.")
        if kind == "person" and people:
            person = rng.choice(people)
            return Question(f"Where is {person}?", f" {person} is in the {world.place_of[person]}.")
        thing = rng.choice(things)
        if kind == "colour":
            return Question(
                f"What colour is the {thing}?", f" The {thing} is {world.colour_of[thing]}."
            )
        return Question(
            f"Where is the {thing}?", f" The {thing} is in the {world.object_place(thing)}."
        )

    def closing(self) -> str:
        return self._rng.choice(words.CLOSINGS)
