"""Write the prose that models are calibrated on: SmolLM2-135M-Instruct answers 193 requests.

    python examples/write_prose.py slr/model/prose.jsonl

The text of the package is what this wrote on 2026-11-29 with transformers 5.23 and torch 2.13, 49
requests at once, on a CPU in 20 minutes beside other work; another processor may sample other
words.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import slr
from slr.checkpoint.atomic import write_text
from slr.checkpoint.folder import load_tokenizer, resolve

KINDS = {
    "Write a long and detailed encyclopedia article about {}.": """
        the history of Lisbon; the river Danube; photosynthesis; the trumpet; volcanoes in
        Iceland; the game of chess; the city of Kyoto; coral reefs; medieval castles; the planet
        Saturn; the Roman aqueducts; the blue whale; the printing press; tropical cyclones; the
        violin; the Battle of Waterloo; the common raven; steam locomotives; the city of
        Nairobi; glaciers; the French Revolution; association football; the Atacama Desert;
        antibiotics; the oak tree; the life of Marie Curie; lighthouses; the Great Wall of
        China; the honey bee; jazz music; the Panama Canal; the Renaissance; the emperor
        penguin; highways in Michigan; rugby union; the Ottoman Empire; plate tectonics; silent
        film; the University of Bologna; battleships; the octopus; the Amazon rainforest;
        cricket; the American Civil War; comets; the saxophone; a television drama series; a
        role-playing video game; a hurricane that struck Florida; a Norwegian football club; a
        British railway station; a heavy metal album; a war novel; an American warship of the
        First World War; a Canadian ice hockey player; a Greek myth; an English king of the
        Middle Ages; a pop song and its music video; a species of mushroom; a comic opera; an
        episode of a science fiction series; a cathedral in northern France; a general of the
        Second World War; a baseball season; an ancient Egyptian queen; a poet of the nineteenth
        century; a river in Oregon; an island in the Pacific Ocean; a professional wrestling
        event; an Indian film director; a suspension bridge; a painter of the Dutch Golden Age;
        a small town in Ohio; a chemical element; a species of shark; an infantry division; a
        literary magazine; a mountain in the Alps; a rock band from Seattle; a Supreme Court
        decision; a lighthouse keeper; a tropical bird; a Formula One race; a fort
    """,
    "Explain {} to a student, in several paragraphs of plain prose.": """
        how vaccines work; why the sky is blue; supply and demand; what a neural network learns;
        how elections are organised; the water cycle; natural selection; compound interest;
        gravity; how a bridge carries weight; inflation; the theory of relativity; what DNA is;
        how bread rises; the causes of the First World War; how the heart works; probability;
        black holes; soil; tides; how a computer stores numbers; the rules of evidence; why
        languages change; sleep; friction; what a constitution is; how airplanes fly; statistics
        and averages; acids and bases; memory; the carbon cycle; how a refrigerator works; prime
        numbers; trade between nations; electricity
    """,
    "Write a short story about {}.": """
        a clockmaker and a storm; two sisters who inherit a farm; a lost letter; the last train
        home; a fisherman and his son; a detective in a quiet village; a robot that learns to
        paint; a teacher's first day; an old map; a garden in winter; a voyage to a distant
        island; a musician who loses her hearing; the night the river rose; a dog that waits at
        the station; a lawyer with a secret; a family dinner; a traveller in the desert; a
        bakery on the corner
    """,
    "Write a newspaper report about {}.": """
        a local election; a new museum; the opening of a hospital; a storm on the coast; a
        strike at a factory; a football final; a scientific discovery; rising house prices; a
        school that won a prize; a trial for fraud; a new railway line; a drought; a merger of
        two companies; an exhibition of photographs; a rescue in the mountains; the price of
        oil; a peace agreement
    """,
    "Write a letter or an essay on {}.": """
        why we read novels; friendship; the value of silence; learning a second language; city
        life; the duty to vote; growing old; the meaning of work; a complaint to a landlord;
        good manners; the beauty of mathematics; travelling alone; advice to a young musician;
        freedom of speech; what we owe to animals; a walk in the forest; the future of the
        library; forgiveness; debt
    """,
    "Give practical advice in full sentences about {}.": """
        planting tomatoes; preparing for an interview; repairing a bicycle; saving money;
        cooking rice; writing a report; choosing a school; training for a marathon; painting a
        room; sleeping well; caring for a cat; packing for a journey; public speaking; baking a
        cake; first aid; keeping a diary; reading a contract; hiking in the mountains; learning
        the piano; moving house
    """,
}  # fmt: skip


def requests() -> list[tuple[str, str]]:
    """Name and request of every document."""
    found = []
    for request, topics in KINDS.items():
        for topic in " ".join(topics.split()).split("; "):
            found.append((topic, request.format(topic)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=320, help="of one document at most")
    parser.add_argument("--batch", type=int, default=49)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model = slr.load("smollm2", dtype=torch.float32)
    tokenizer = load_tokenizer(resolve("smollm2"))
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(given.seed)
    documents, wanted = [], requests()
    for low in range(0, len(wanted), given.batch):
        some = wanted[low : low + given.batch]
        asked = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for _, text in some
        ]
        prompt = tokenizer(asked, return_tensors="pt", padding=True, add_special_tokens=False)
        ids = model.generate(
            **prompt, max_new_tokens=given.tokens, do_sample=True, temperature=0.9, top_k=50,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        new = ids[:, prompt["input_ids"].shape[1] :]
        for (name, _), text in zip(
            some, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            documents.append({"name": name, "text": text.strip()})
        print(f"{len(documents)} of {len(wanted)}", flush=True)
    lines = (json.dumps(document, ensure_ascii=False) for document in documents)
    write_text(given.out, "".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
