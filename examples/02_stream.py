"""Stream a text and mark which tokens a drafter had guessed."""

from foretoken import LLM, SamplingParams

llm = LLM("stories")
marks = []
print("The little dog", end="")
for chunk in llm.stream("The little dog", SamplingParams(max_new_tokens=40)):
    print(chunk.text, end="", flush=True)
    marks += ["+" if source else "." for source in chunk.sources]
    if chunk.output is not None:
        reason, stats = chunk.output.finish_reason, chunk.output.stats
        print(f"\n\n{reason.value}: {stats.tokens_per_step:.1f} tokens per step")

print("guessed (+) or the target's own (.):", "".join(marks))
