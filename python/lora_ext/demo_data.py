"""Small texts, written for this project, on which ``lora-ext demo`` trains its adapters."""

from __future__ import annotations


def paragraphs(text: str) -> list[str]:
    """Split ``text`` at empty lines; line breaks within a paragraph are only layout."""
    return [" ".join(block.split()) for block in text.strip().split("\n\n")]


BASE = """
The fox and the grapes. A hungry fox came into a garden and saw a bunch of ripe grapes hanging
from a high branch. He jumped, but the grapes were too high. He jumped again, and again he fell
short. At last the fox walked away and said, "The grapes are sour, and I did not want them." It is
easy to scorn what we cannot reach.

The crow and the jar. A thirsty crow found a tall jar with a little water at the bottom. Her beak
could not reach the water, and the jar was too heavy to turn over. So the crow picked up small
stones and dropped them into the jar, one after another. Slowly the water rose, and the crow could
drink. Little by little does the work.

The hare and the tortoise. A hare laughed at a tortoise because the tortoise was slow. "Let us run
a race," said the tortoise, and the hare agreed. The hare ran far ahead and lay down in the shade
to sleep. The tortoise walked on and did not stop. When the hare woke up, the tortoise was already
at the end of the road. Slow and steady wins the race.

The lion and the mouse. A lion caught a mouse, and the mouse begged for her life. "Let me go,"
said the mouse, "and one day I will help you." The lion smiled and let her go. In the winter the
lion was caught in a net. The mouse heard him roar, came running, and cut the net with her teeth.
No kindness is ever lost.

The ant and the grasshopper. All summer the ant carried grain into her house, and all summer the
grasshopper sang. In the winter the grasshopper was hungry and came to the door of the ant. "What
did you do in the summer?" asked the ant. "I sang," said the grasshopper. "Then now you may
dance," said the ant. The wise prepare today for the needs of tomorrow.

The dog and his shadow. A dog walked over a bridge with a piece of bread in his mouth. In the
water below he saw another dog with another piece of bread. He wanted both, so he opened his mouth
and barked, and his own bread fell into the river. The old dog went home with nothing. Those who
want everything may lose what they have.

The wind and the sun. The wind and the sun asked which of them was stronger. On the road below
walked an old man in a warm coat. The wind blew with all his strength, but the old man only held
his coat more tightly. Then the sun came out and shone gently, and the old man took off his coat
and sat down in the shade. Kindness does more than force.

The boy and the wolf. A boy kept sheep on a hill above the village. To amuse himself he cried,
"Wolf!" and all the people came running, but there was no wolf. One evening a wolf really came.
The boy cried and cried, but nobody believed him, and the wolf ate as it pleased. Nobody believes
a liar, even when he speaks the truth.
"""

RECIPES = """
The old kitchen recipe for bread. Take 500 grams of flour, 300 grams of water, 10 grams of salt
and a little yeast. Mix everything in a large bowl and knead the dough for ten minutes. Let it
rest for two hours. Bake the bread at 230 degrees for forty minutes.

The soup of the house. Take two onions, three carrots and one stick of celery. Cut everything
small and fry it gently in butter. Add one litre of water and a spoon of salt. Let the soup cook
for half an hour. Serve it hot, with fresh bread.

In the morning make the pancakes. Take two eggs, 250 grams of flour and half a litre of milk. Mix
everything in a large bowl until the batter is smooth. Heat a little butter in the pan. Fry each
pancake for one minute on both sides. Serve them with honey.

A good tomato sauce. Take one kilo of ripe tomatoes, two cloves of garlic and a little oil. Cut
everything small and fry it gently in the oil. Add a spoon of salt and some basil. Let the sauce
cook for half an hour. Serve it with fresh pasta.

At last the apple cake. Take four apples, three eggs, 200 grams of sugar and 200 grams of flour.
Mix everything in a large bowl and cut the apples small. Heat the oven and butter the tin. Bake
the cake at 180 degrees for forty minutes. Serve it with cream.
"""

SEA_LOG = """
The old ship left the harbour at six bells. Wind south west, force four, sea moderate. Course
north by east, speed seven knots. All sails set. The mate took the first watch. Nothing more to
report.

In the morning fog came down on the water. Wind light, from the east, sea calm. Course north,
speed two knots. We rang the bell every five minutes. The mate heard a horn to starboard. Nothing
more to report.

At last we sighted land off the port bow. Wind west, force five, sea rough. Course north west,
speed eight knots. We took in the topsails. The captain took the second watch. Nothing more to
report.

A good breeze all through the night. Wind south, force three, sea slight. Course north by west,
speed six knots. All sails set. The crew mended the nets on deck. Nothing more to report.

The storm broke at four bells. Wind north west, force nine, sea very high. Course held with two
men at the wheel, speed three knots. We lost the small boat and one sail. The captain stayed on
deck until daylight. Nothing more to report.
"""

NIGHT_SKY = """
The old observatory, night one. Sky clear, seeing good. The moon set before midnight. Jupiter
stood high in the south with four small moons in a line. The red spot was easy to see. Drawn at
the eyepiece with a power of two hundred.

In the morning hours, night two. Sky clear, seeing poor. Venus rose before the sun as a thin
bright crescent. Mercury was lost in the haze. Nothing could be drawn. Closed the dome with the
first light.

At last a dark sky, night three. Sky very clear, seeing good. The great nebula in Orion filled the
field like a pale wing. Four young stars shone in its heart. Drawn at the eyepiece with a power of
eighty.

A good hour between clouds, night four. Sky broken, seeing fair. Saturn stood low in the east with
its rings wide open. One moon was seen beside it. Drawn at the eyepiece with a power of two
hundred.

The comet, night five. Sky clear, seeing fair. The tail reached half way to the pole star and was
faintly blue. The head was round and bright. Drawn with the naked eye. Closed the dome with the
first light.
"""
