# %% [markdown]
# # Do Matryoshka SAEs replicate?
#
# This notebook shows what the repository measured, in figures and tables made from the files in
# `results/`. Beside them are the commands that made those files, with the CPU and the commit. The
# commands are read from the settings in the files. A test runs the notebook again and compares.
# Nothing is trained here.
#
# The paper: Bussmann, Nabeshima, Karvonen, Nanda 2025, [Learning Multi-Level Features with
# Matryoshka Sparse Autoencoders](https://arxiv.org/abs/2503.17547). "The write-up" is the guided
# replication whose settings are used here, *How Matryoshka Sparse AutoEncoders recover feature
# hierarchies*; its numbers are labelled as reported.
#
# In short:
#
# - On the paper's toy tree the result replicates in most seeds, and with restarts, which are our
#   addition, in all of them (section 2). This is at a cosine of 0.9. At 0.95 vanilla wins, until
#   the decoder is refitted (section 5).
# - On the toy, refitting a trained SAE by least squares wins back nearly all of the reconstruction
#   that Matryoshka costs. On other trees than the paper's, Matryoshka SAEs do not always win;
#   training that does not hedge succeeds on most of them (section 5).
# - On a stand-in for the language model, Matryoshka SAEs trained as in the write-up reconstruct
#   better than vanilla ones and absorb less (section 3). The real model has not been run.

# %%
import sys

sys.path.insert(0, "..")  # the repository, where it is not installed

import figures
import language_model
import toy
from showing import figure, made_by, measured_by, png, text

import train_toy
from matryoshka import plots
from studies import report, tables

TOY = tables.read("toy/sampled.json")
TREE = train_toy.load_tree(TOY["sources"][0]["config"]["tree"])
RECIPES = [f"toy/{file}.json" for file in tables.RECIPES.values()]

# %% [markdown]
# ## 1. The idea
#
# An SAE writes an activation as a sparse sum of directions, $\hat x = \sum_j a_j d_j + b$. A
# Matryoshka SAE has to do so with each of several *prefixes* of its dictionary, that is, with the
# first $m$ latents alone. The lengths $m$ are drawn afresh in each step, and the loss is the mean
# over them. Latents are ordered by how much they contribute. The first ones are in nearly every
# prefix and have to be useful by themselves, so they stay general. The last ones are in one or two
# prefixes and may build on the others.

# %%
figure(
    figures.nested, alt="Prefixes of one step, the law of their lengths, and each latent's reach"
)

# %% [markdown]
# Left: the ten prefixes of the toy's first step (seed 0). Middle: nine lengths are drawn without
# replacement with $P(l) \propto \sqrt{l} - \sqrt{l-1}$, so short ones are drawn most often; the
# tenth is the whole dictionary. Right: the loss depends on the prefixes only through a latent's
# *reach*, the share of prefixes that contain it. A vanilla SAE has one prefix, so every reach is 1.
#
# ## 2. The toy, where the truth is known
#
# Three parent features have three mutually exclusive children each, and eight rare features stand
# alone. The 20 features are orthogonal directions in 20 dimensions. A child is active only with its
# parent, and then with probability 0.2. An SAE has 20 latents, so one for each feature, if it finds
# them all.

# %%
png(
    tables.RESULTS / "toy" / "activations.png",
    alt="The same samples as the features, the vanilla and the Matryoshka SAE see them",
)

# %% [markdown]
# Amber marks **absorption**. In the vanilla SAE a parent's latent is silent on samples where one of
# its children is active, and the child's latent covers both. One latent then fires in place of two,
# which is what a sparsity penalty rewards. In this Matryoshka SAE, parents fire on all of their
# samples. Both SAEs are those of seed 0.
#
# A feature is *clean* if the decoder direction of some latent has a cosine over 0.9 with it.

# %%
text(made_by("toy/sampled.json", "train_toy.py"), tables.toy)

# %% [markdown]
# The rows *as reported* are the write-up's, of one seed each. Counts over seeds come with the exact
# 95% interval of Clopper and Pearson.
#
# ### Absorption and hedging in the cosines
#
# With orthonormal features $p$ (a parent) and $c_1, c_2, c_3$ (its children), two mistakes can be
# predicted without training anything:
#
# - *Absorption* (vanilla): the child's latent points along $c + p$, so its cosine with the child is
#   $1/\sqrt 2 = 0.707$. The parent stays clean: its latent fires on the remaining samples, those of
#   the parent without a child.
# - *Hedging* (Matryoshka): in a short prefix the parent's latent also stands for its children, so
#   it takes in their mean and points along $p + 0.2\,(c_1 + c_2 + c_3)$. Its cosine with the parent
#   is $1/\sqrt{1 + 3 \cdot 0.2^2} = 0.945$. The child's latent must then add $0.8\,c_1$ and remove
#   $0.2\,(c_2 + c_3)$, so its cosine with the child is 0.943.
#
# The figure has the best cosine of every feature in every seed, beside these predictions. Rare
# features have neither parent nor child, so neither mistake concerns them.

# %%
figure(figures.cosines, TOY, alt="Histograms of the best decoder cosine by kind of feature")

# %% [markdown]
# Both SAEs make a systematic error, and the threshold of 0.9 lies between the two: vanilla's error
# is larger. Matryoshka SAEs do not recover parents and children exactly; section 5 shows the result
# at a threshold of 0.95. The next figure shows every feature and seed:

# %%
figure(
    plots.toy_seeds,
    [run for run in TOY["runs"] if run["sae"] in tables.kinds_of(TOY)],
    TREE,
    alt="Best cosine of every feature and seed, and how many seeds reach how many clean features",
)

# %% [markdown]
# ### Why seeds fail

# %%
text(toy.failures(TOY))

# %% [markdown]
# A single run hides this. In nearly all of the failed seeds that were looked at, the parents are
# found, and the last latent fires where a parent is active *without* a child. Hedging makes these
# samples a twenty-first thing to explain: the parent's direction contains some of its children,
# which is an error if no child is active. A latent that settles on this error is missing elsewhere.
# Nothing pulls a latent towards the feature that is lost, because a latent that fires on none of a
# feature's samples gets no gradient from them.
#
# *Restarts* (`--restart-every 100`; not in the paper, off by default) compare the last latent,
# every 100 steps, with the residual along the residual's largest sample. If the residual's mean
# square there is larger than that of the latent's contribution, the latent is restarted in that
# direction. Restarts were devised on the seeds of the first rows, so the row with seeds not looked
# at before is their test. *Expected prefixes* replace the ten sampled ones by the exact mean over
# all that could be drawn. *Steps to 20/20* is the first step from which on all features stay clean,
# as the median over the seeds that get there. *s* is the time of so many steps of one SAE alone
# (section 4). For *steps, refit* the decoder is refitted each time that is looked at (section 5).

# %%
text(
    *(made_by(name, "train_toy.py") for name in RECIPES),
    tables.recipes,
)
figure(figures.recipes, alt="FVU of every Matryoshka seed by recipe, failed seeds marked")

# %% [markdown]
# Do seeds fail because this is a re-implementation? The original code has three defects that change
# what is trained. Reordering latents leaves Adam's moments behind (`moments`), and also the running
# mean that orders them (`order`). The running input norm starts at 0 (`normalizer`). Here the
# defects are put back one by one, and all together:

# %%
text(
    made_by("ablation/ablation.json", "-m studies.ablate_toy"),
    tables.defects,
    toy.told_apart,
)

# %% [markdown]
# Seeds fail with the defects and without them. These seeds are too few to show that any of the
# three helps or harms. They were fixed because they are wrong.
#
# ## 3. A language model
#
# **This section is about a stand-in.** The write-up trains SAEs on TinyModel, whose weights were
# not available here. The stand-in is a smaller model of the same architecture (4 layers, `d_model`
# 256 instead of 768, 8.3M parameters), trained on about 350,000 tokens of real TinyStories stories.
# The SAEs are trained on its activations on those same stories. They have 1,024 latents and a
# target L0 of 20. This tests the whole pipeline, but its numbers neither confirm nor refute the
# write-up's:
#
# | as reported, of the real model; not run here | FVU | L0 | dead |
# |---|---:|---:|---:|
# | Matryoshka | 0.189 | 29.9 | 0% |
# | vanilla | 0.176 | 30.1 | 0% |
#
# The commands that cache, evaluate and refit are in `docs/language_models.md`. Section 5 explains
# the rows with *refit*.

# %%
STAND_IN = language_model.StandIn()
text(
    made_by(language_model.TRAINING, "train_tinystories.py"),
    tables.standin,
    "The same on a GPU, with bfloat16 and with expected prefixes:",
    tables.standin_variants,
    STAND_IN.judged_on(),
    STAND_IN.better(),
)

# %% [markdown]
# At equal L0, a Matryoshka SAE has to do more than a vanilla one, and the write-up reports that
# this costs FVU on the real model. On the stand-in it does not. The original code gave the same
# sign as ours on the stand-in, in one seed. The reason is L1, which lets a vanilla SAE's latents
# repeat each other at no cost. The next table has three seeds for each of three ways to charge for
# sparsity (`docs/language_models.md`):

# %%
text(tables.signs)
text("Other activation functions, unhedged training, and SAELens's SAEs (`docs/recipes.md`):")
text(tables.frontier)
text("SAELens's SAEs at each learning rate:", tables.saelens)

# %% [markdown]
#
# *Loss recovered* is 0% if the activations are replaced by their mean, and 100% if nothing is
# replaced. *Highest cosine* is the cosine of a latent's decoder direction with the nearest other
# one, as a mean over latents; if it is high, the dictionary repeats itself.
#
# The refit of the decoder lowers the FVU, but also, slightly, the loss recovered: what fits the
# activations better need not serve the model better. *Refit both* also fits the encoder anew, and
# kills many of the latents. Expected prefixes reconstruct slightly better than sampled ones.
# *bfloat16* rounds the operands of training's matrix products.
#
# ### The first latents alone

# %%
figure(plots.fvu_by_prefix, report.fvu_curves(), alt="FVU by how many latents are used")
text(STAND_IN.by_prefix())

# %% [markdown]
# The vanilla SAE's latents are also ordered by how much they contribute, but it was never trained
# to reconstruct from the first ones alone.

# %%
figure(plots.density_histograms, report.density_histograms(), alt="How often latents fire")

# %% [markdown]
# ### Absorption
#
# There is no truth to compare with, so concepts take the place of parents. A concept is a set of
# token ids, such as animals or colours (`matryoshka/concepts.json`). On half of the rows, each
# concept gets a detector: the latent whose firing detects its tokens best (by F1). On the other
# half, a token of the concept is *absorbed* if the detector is silent and a more specific latent
# fires instead. A more specific latent fires almost only on the concept, but covers less of it. The
# tables have means over seeds:

# %%
text(STAND_IN.concepts, tables.concepts)

# %% [markdown]
# Read absorption together with the detector's precision and recall. If those are low, no latent
# stands for the concept, and there is little that could be absorbed. *Of its total* is a concept's
# share of the SAE's total absorption; a few concepts with frequent tokens make up most of it. Which
# SAE absorbs more depends on the concept, and for some concepts on the seed.
#
# ### The latents themselves
#
# `browse.py` writes a page of latents. The picture is a part of the forest of the Matryoshka SAE of
# seed 0. `docs/browse.md` has five latents that show what the method claims, and five observations
# that contradict it.

# %%
png(
    tables.RESULTS / "standin" / "tree.png",
    alt="Full stops, said, was and commas, each with the latents that fire only where it does",
)

# %% [markdown]
# ## 4. Speed
#
# The first figure compares a training step at the write-up's size (`d_model` 768, 3,072 latents,
# batch 1,024) with the five matrix products that a dense implementation has to do: one to encode,
# one to decode, and three in the backward pass. Our gradient is written out by hand and skips
# silent latents (`matryoshka/kernels/`). Unless a bar says otherwise, 30 latents fire on an input
# of synthetic data (`studies/bench.py` says which). *Fresh* SAEs are as initialised, when half of
# all latents fire, or 30 with BatchTopK. *bfloat16* rounds the operands of the products, but not
# the parameters (`--matmul-dtype bfloat16`).

# %%
figure(figures.speed, alt="Time of a training step by kind, and by the size of the dictionary")
for part, table in (
    ("step", tables.step),
    ("growth", tables.growth),
    ("data", tables.data),
    ("toy", lambda: tables.bench_table("toy")),
    ("toy-whole", lambda: tables.bench_table("toy-whole")),
):
    text(measured_by(part), table)
text("A step on a GPU (`docs/speed.md`):", tables.step_gpu)
text("A step on a CPU with bfloat16 instructions, timed beside other work:", tables.step_xeon)
text("What browsing costs (`docs/browse.md`):", tables.browsing)

# %% [markdown]
# Times are medians of repeats on a shared machine. Compare ratios within one table, not times
# between tables.
#
# ## 5. Beyond the paper
#
# The tables above have rows with *expected prefixes*. The loss is linear in the reach, so its mean
# over all prefixes that could be drawn is the same loss at the expected reach. This removes the
# noise of sampling from the gradient, but on the toy as many seeds fail. At full size a step takes
# longer on a CPU, since no two latents share a reach (section 4).
#
# ### The refit
#
# Hedging costs reconstruction, and a finished SAE can win that back. With the encoder fixed,
# finding the decoder that reconstructs best is a least-squares problem (`matryoshka/refit.py`). The
# same latents fire before and after. But a parent's latent fires more strongly while a child is
# active, and no decoder can undo that. *Refit both* keeps only the information on which samples
# each latent fires. Each latent gets the direction that it adds on those samples, and its encoder
# is fitted to that by least squares, too.

# %%
figure(report.draw_refits, alt="Best cosines by kind of feature before and after the refits")
text(
    *(made_by(name, "train_toy.py") for name in RECIPES),
    tables.refitted,
)

# %% [markdown]
# The other columns are means over all seeds. Starred columns are over the seeds whose Matryoshka
# SAE had 20/20 as trained: the largest FVU, how many have all features over 0.95 and 0.99, and the
# lowest best cosine of any feature. In these seeds, refitting both wins back nearly all of what
# Matryoshka costs. The refits leave the vanilla SAE's directions unchanged, because absorption
# shows in which latents fire, and refits keep that. They repair no failed seed, and leave fewer
# features clean in some of them. On the stand-in (section 3) refitting both does harm: there the
# samples on which a latent fires are not a half-space that least squares could find.

# %%
figure(
    figures.clean_by_threshold, TOY, alt="Clean features by threshold, before and after the refits"
)

# %% [markdown]
# ### Harder trees
#
# Four variants of the toy are harder: a tree three levels deep, children of uneven frequency,
# activations that are not just 0 or 1, and 20 features in 14 dimensions, which cannot be
# orthogonal. The table has the number of clean features at 0.9 and the FVU, as means over seeds.
# *All 20* counts Matryoshka seeds.

# %%
for name in tables.TREES:
    text(*(made_by(f"trees/{name}_{every}.json", "train_toy.py") for every in (0, 100)))
text(tables.trees)

# %% [markdown]
# ### Does it recover the tree?
#
# A latent's parent is an earlier latent that fires on nearly all of its samples and on others. The
# resulting forest of latents is compared with the true tree.

# %%
text(tables.edges)

# %% [markdown]
# So the toy's result depends on its tree. If activations are graded, it holds in every seed. With
# three levels, Matryoshka SAEs recover fewer features than vanilla ones. With uneven children they
# recover more, and in 14 dimensions hardly more, but far from all. Restarts never failed on the
# paper's tree, but make none of these three succeed. Neither does refitting both, which made every
# success on the paper's tree nearly perfect. In the seeds of the three-level tree that were looked
# at, some latent at each level fires where a parent is active without its children. In failed seeds
# of the paper's tree this costs one latent, here several. If activations are graded, refitting both
# lets the *vanilla* SAE find most of the children: there its parents' latents do fire beside their
# children, only more weakly, and a refit corrects strengths.
#
# ### Training that does not hedge
#
# In the first half of the steps, the encoder is tied to the decoder's directions and there are no
# prefixes. In the second half, the encoder is free and learns from the prefixes, while the decoder
# still learns from the full reconstruction. This finds all features of the trees above in all seeds
# or, with three levels, in most of them, but not in 14 dimensions.

# %%
text(made_by("toy/unhedged.json", "train_toy.py"), tables.unhedged)

# %% [markdown]
# In 14 dimensions the true dictionary is not an optimum of the loss. With an encoder trained for
# it, the loss is higher than where training ends, and descent from it loses features
# (`docs/toy.md`).

# %%
text(tables.at_the_truth)

# %% [markdown]
# ### Two thousand known features
#
# This is SynthSAEBench at a small size, beside SAELens's own training on the same samples
# (`docs/synth.md`).

# %%
text("After 4,096 steps:", tables.synth)
text("At each learning rate, with seed 0:", tables.synth_lrs)
text("After 1,024 steps:", tables.synth_short)

# %% [markdown]
# ## 6. Limits
#
# - SAEs of the real TinyModel have not been trained here, and nothing has been run on Modal. The
#   stand-in is a small model, and its SAEs make many passes over little text; the write-up makes
#   one pass over 30 million tokens.
# - "Clean" means a cosine over 0.9, the write-up's threshold. At 0.95 most hedged features of a
#   Matryoshka SAE are not clean until they are refitted.
# - On the toy neither SAE reaches its target L0. By the end the sparsity weight has decayed to
#   almost nothing, as in the original. The target, 1.2338, is above the tree's true L0 of 1.12.
# - Restarts never failed on the paper's tree. On three of the four harder ones they recover all
#   features in no seed.
# - The explanation of why seeds fail was read off failed seeds. No intervention but the restarts
#   themselves has tested it.
# - The concepts are word lists. Their absorption tells how well one latent for each concept would
#   do, not what the model's own concepts are.
