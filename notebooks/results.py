# %% [markdown]
# # Do Matryoshka SAEs replicate?
#
# What this repository measured, with figures and tables made from the files in `results/`. Beside
# them stand the commands that made those files, read from the settings in them, and on which CPU,
# at which commit. A test runs this notebook again and compares. Nothing is trained here.
#
# The paper: Bussmann, Nabeshima, Karvonen, Nanda 2025, [Learning Multi-Level Features with
# Matryoshka Sparse Autoencoders](https://arxiv.org/abs/2503.17547). "The write-up" is the guided
# replication whose settings are used here, *How Matryoshka Sparse AutoEncoders recover feature
# hierarchies*; its numbers are labelled as reported.
#
# In short: on the paper's toy tree it replicates, in most seeds, and a recipe of our own makes the
# rest succeed (section 2); that is at a cosine of 0.9, at 0.95 vanilla wins until the decoder is
# refitted (5). On a stand-in for the language model, Matryoshka SAEs reconstruct better
# than vanilla ones and absorb less (3); the real model has not been run. Least squares on a trained
# SAE pays back nearly all of the toy's reconstruction cost. On other trees than the paper's,
# Matryoshka SAEs do not always win (5).

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
# Matryoshka SAE must do so with each of several *prefixes* of its dictionary: the first $m$ latents
# alone, for lengths $m$ drawn afresh each step, and the loss is the mean over them. Latents are
# kept in order of size. The first ones are in nearly every prefix and have to be of use by
# themselves, so they stay general; the last ones are in one or two and may build on the rest.

# %%
figure(
    figures.nested, alt="Prefixes of one step, the law of their lengths, and each latent's reach"
)

# %% [markdown]
# Left: the ten prefixes of the toy's first step (seed 0). Middle: lengths are drawn with
# $P(l) \propto \sqrt{l} - \sqrt{l-1}$, short ones most often, nine of them without replacement; the
# tenth is the whole dictionary. Right: all that the loss knows of this is a latent's *reach*, the
# share of prefixes that hold it. A vanilla SAE has one prefix, and every reach is 1.
#
# ## 2. The toy, where the truth is known
#
# Three parent features have three mutually exclusive children each; eight rare features stand
# alone. Each is an orthogonal direction in 20 dimensions. A child is active only with its parent,
# with probability 0.2. An SAE gets 20 latents, one a feature if it finds them.

# %%
png(
    tables.RESULTS / "toy" / "activations.png",
    alt="The same samples as the features, the vanilla and the Matryoshka SAE see them",
)

# %% [markdown]
# Amber is **absorption**. In the vanilla SAE a parent's latent is silent on samples where one of
# its children is active, and the child's latent covers both: one latent fires in place of two,
# which is what a sparsity penalty asks for. In this Matryoshka SAE, parents fire on all of their
# samples. (Both of seed 0.)
#
# A feature is *clean* where some latent's decoder direction has a cosine over 0.9 with it.

# %%
text(made_by("toy/sampled.json", "train_toy.py"), tables.toy)

# %% [markdown]
# The rows *as reported* are the write-up's, of one seed each. Counts over seeds carry the exact 95%
# interval of Clopper and Pearson.
#
# ### Absorption and hedging in the cosines
#
# With orthonormal features $p$ (a parent) and $c_1, c_2, c_3$ (its children), two mistakes can be
# predicted without training anything:
#
# - *Absorption* (vanilla): the child's latent points along $c + p$, at cosine $1/\sqrt 2 = 0.707$
#   to the child. The parent is left clean: its latent fires on what remains, parent without child.
# - *Hedging* (Matryoshka): in a short prefix the parent's latent stands for its children too, and
#   takes in their mean, $p + 0.2\,(c_1 + c_2 + c_3)$, at cosine
#   $1/\sqrt{1 + 3 \cdot 0.2^2} = 0.945$ to the parent. The child's latent must then add $0.8\,c_1$
#   and take back $0.2\,(c_2 + c_3)$: 0.943.
#
# Below, the best cosine of every feature in every seed beside those predictions. Rare features have
# nobody to be confused with.

# %%
figure(figures.cosines, TOY, alt="Histograms of the best decoder cosine by kind of feature")

# %% [markdown]
# Both SAEs make a systematic error, of different size: the threshold of 0.9 lies between them.
# Matryoshka SAEs do not recover parents and children exactly; section 5 shows what a threshold of
# 0.95 would say. By feature and seed:

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
# found, and the last latent fires where a parent is active *without* a child.
# Hedging makes that a twenty-first thing to explain: the parent's direction holds some of its
# children, and where there are none, that is an error. A latent that settles there is missing
# elsewhere, and one that fires on none of a feature's samples gets no gradient from them, so
# nothing descends towards the feature that is lost.
#
# *Restarts* (`--restart-every 100`; not in the paper, off by default) look every 100 steps whether
# the residual is worth more, along its largest sample, than the last latent is, and if so restart
# it there. They were devised on the seeds of the first rows, so the row that tests them is that of
# the seeds not looked at before. *Expected prefixes* replace the ten sampled ones by the exact mean
# over all that may be drawn. *Steps to 20/20*: the median, over the seeds that come to it, of the
# first step from which on all features stay clean; in seconds of one SAE alone (section 4); and
# with the decoder refitted wherever that was looked at (section 5).

# %%
text(
    *(made_by(name, "train_toy.py") for name in RECIPES),
    tables.recipes,
)
figure(figures.recipes, alt="FVU of every Matryoshka seed by recipe, failed seeds marked")

# %% [markdown]
# Is it the re-implementation that fails? The original code has three defects that change what is
# trained: reordering latents leaves Adam's moments behind (`moments`) and the running mean that
# orders them (`order`), and the running input norm starts at 0 (`normalizer`). Put back one by one,
# and all together:

# %%
text(
    made_by("ablation/ablation.json", "-m studies.ablate_toy"),
    tables.defects,
    toy.told_apart,
)

# %% [markdown]
# Seeds fail with the defects and without them. So few seeds do not show that any of the three helps
# or harms; they were mended for being wrong.
#
# ## 3. A language model
#
# **What follows is of a stand-in.** The write-up trains SAEs on TinyModel, whose weights could not
# be had here. In its place stands a smaller model of the same architecture (4 layers, `d_model` 256
# against 768; 8.3M parameters), trained on about 350,000 tokens of real TinyStories stories. Its
# SAEs are trained on its activations on those same stories; they have 1,024 latents and aim at L0
# 20. It tries the whole pipeline; its numbers do not bear on the write-up's:
#
# | as reported, of the real model; not run here | FVU | L0 | dead |
# |---|---:|---:|---:|
# | Matryoshka | 0.189 | 29.9 | 0% |
# | vanilla | 0.176 | 30.1 | 0% |
#
# Its caches, and the commands that evaluate and refit, are in `docs/language_models.md`. The rows
# with *refit* are of section 5.

# %%
STAND_IN = language_model.StandIn()
text(
    made_by(language_model.TRAINING, "train_tinystories.py"),
    tables.standin,
    "bfloat16 and expected prefixes, on a GPU:",
    tables.standin_variants,
    STAND_IN.judged_on(),
    STAND_IN.better(),
)

# %% [markdown]
# At equal L0, a Matryoshka SAE has to do more than a vanilla one, and the write-up reports that it
# costs FVU on the real model. On the stand-in it does not; the original code gave the same sign on
# it, in one seed. There L1 is why: it lets a vanilla SAE's latents repeat each other for nothing.
# Three seeds, sparsity charged for in three ways (docs/language_models.md):

# %%
text(tables.signs)
text("BatchTopK, unhedged training, and SAELens's SAEs (docs/recipes.md):", tables.frontier)
text("SAELens's at each learning rate:", tables.saelens)

# %% [markdown]
#
# *Loss recovered* is 0% where the mean stands in for the activations and 100% where nothing is
# replaced. *Highest cosine*: of a latent's decoder direction to the nearest other one, a mean over
# latents; where it is high, the dictionary repeats itself.
#
# The refit of the decoder lowers FVU and with it, slightly, the cross-entropy recovered: what fits
# the activations better need not serve the model better. *Refit both* fits the encoder anew as well
# and kills many of the latents. Expected prefixes reconstruct alike. *bfloat16* rounds the operands
# of training's matrix products.
#
# ### The first latents alone

# %%
figure(plots.fvu_by_prefix, report.fvu_curves(), alt="FVU by how many latents are used")
text(STAND_IN.by_prefix())

# %% [markdown]
# The vanilla SAE's latents are in order of size as well, but it was never asked to work without the
# rest.

# %%
figure(plots.density_histograms, report.density_histograms(), alt="How often latents fire")

# %% [markdown]
# ### Absorption
#
# There is no truth to compare with, so concepts stand in for parents: sets of token ids, as of
# animals or colours (`matryoshka/concepts.json`). On half of the rows, each concept gets a
# detector: the latent whose firing tells its tokens best (by F1). On the other half, a token is
# *absorbed* where the detector is silent and a more specific latent fires instead, one that fires
# almost only on the concept but covers less of it. Means over seeds:

# %%
text(STAND_IN.concepts, tables.concepts)

# %% [markdown]
# Read absorption with the detector's precision and recall: where those are low, no latent stands
# for the concept, and there is little that could be absorbed. *Of its total* is the share of an
# SAE's whole absorption that a concept makes: a few concepts of frequent tokens make most of it.
# Which SAE absorbs more depends on the concept, and for some on the seed.
#
# ### Its latents, to look at
#
# `browse.py` writes a page of latents; here, a part of the forest of the Matryoshka SAE of seed 0.
# docs/browse.md has five latents that show what the method claims, and five that contradict it.

# %%
png(
    tables.RESULTS / "standin" / "tree.png",
    alt="Full stops, said, was and commas, each with the latents that fire only where it does",
)

# %% [markdown]
# ## 4. Speed
#
# A step at the write-up's size (`d_model` 768, 3,072 latents, batch 1,024), against the five dense
# matrix products that a dense implementation cannot do without: encode, decode, and three backward.
# The gradient is written out by hand and skips what is silent (`matryoshka/kernels/`). Bars without
# a word fire 30 latents an input, on synthetic data (`studies/bench.py` says which); *fresh* ones
# are at initialisation, where half of all latents fire. *bfloat16*: the products' operands are
# rounded to it, and what is learnt is not (`--matmul-dtype bfloat16`).

# %%
figure(figures.speed, alt="Time of a training step by kind, and by the size of the dictionary")
for part, table in (
    ("step", tables.step),
    ("growth", tables.growth),
    ("data", tables.data),
    ("toy", lambda: tables.of_bench("toy")),
    ("toy-whole", lambda: tables.of_bench("toy-whole")),
):
    text(measured_by(part), table)
text("A step on a GPU (docs/speed.md):", tables.step_gpu)
text("A step on a CPU with bfloat16, timed beside other work:", tables.step_xeon)
text("What browsing costs (docs/browse.md):", tables.browsing)

# %% [markdown]
# Times are medians of repeats on a shared machine; ratios within one table are what they are good
# for.
#
# ## 5. Beyond the paper
#
# *Expected prefixes*, in the tables above: the loss is linear in the reach, so its mean over all
# prefixes that may be drawn is the same loss at the expected reach. It takes the noise of sampling
# out of the gradient; in the toy, seeds fail all the same. At full size a step costs more on a CPU,
# since no two latents share a reach (section 4).
#
# ### The refit
#
# Hedging costs reconstruction that a finished SAE need not pay: with the encoder fixed, the decoder
# that reconstructs best is a least-squares problem (`matryoshka/refit.py`). The same latents fire
# before and after. But a parent's latent fires stronger where a child is active, and no decoder can
# undo that. *Refit both* keeps only where latents fire: each is to stand for what it adds wherever
# it fires, and its encoder is fitted to that by least squares, too.

# %%
figure(report.draw_refits, alt="Best cosines by kind of feature before and after the refits")
text(
    *(made_by(name, "train_toy.py") for name in RECIPES),
    tables.refitted,
)

# %% [markdown]
# Means over seeds; starred columns over the seeds whose Matryoshka SAE had 20/20 as trained: the
# largest FVU, how many have all features over 0.95 and 0.99, and the lowest best cosine of all. In
# those, refitting both pays back next to all of what Matryoshka costs. The refits leave the vanilla
# SAE's directions where they are: what absorption has done lies in which latents fire. They mend no
# failed seed, and count fewer clean features in some of them. On the stand-in (section 3) refitting
# both does harm: there, whether a latent fires is not a half-space that least squares finds.

# %%
figure(
    figures.clean_by_threshold, TOY, alt="Clean features by threshold, before and after the refits"
)

# %% [markdown]
# ### Harder trees
#
# Three levels deep, children of uneven frequency, activations that are not 0 or 1, and 20 features
# in 14 dimensions, which cannot be orthogonal. Clean features at 0.9 and FVU, means over seeds;
# *all 20* counts Matryoshka seeds.

# %%
for name in tables.TREES:
    text(*(made_by(f"trees/{name}_{every}.json", "train_toy.py") for every in (0, 100)))
text(tables.trees)

# %% [markdown]
# ### Does it recover the tree?
#
# A parent is a latent of an earlier place that fires wherever its child does; the forest of latents
# is held against the true tree.

# %%
text(tables.edges)

# %% [markdown]
# So the toy's result depends on the toy's tree. With graded activations it holds in every seed.
# With three levels, Matryoshka SAEs recover fewer features than vanilla ones; with uneven children
# they recover more, in too few dimensions hardly more, and far from all. Restarts, which never
# failed on the paper's tree, make none of these succeed; nor does refitting both, which made every
# success there next to perfect. In the seeds of the three-level tree that were looked at, latents
# fire where a parent is active without its children, once a level: what costs one latent in failed
# seeds of the paper's tree costs several here. Where features are not binary, refitting both lets
# the *vanilla* SAE find most of the children: its parents' latents do fire beside their children
# there, only weaker, and strengths are what is refitted.
#
# ### Training that does not hedge
#
# Half of the steps with the encoder tied to the decoder's directions and no prefixes; then the
# encoder is free and learns from the prefixes, the decoder from the full reconstruction. It finds
# the trees above, but the one in 14 dimensions.

# %%
text(made_by("toy/unhedged.json", "train_toy.py"), tables.unhedged)

# %% [markdown]
# There the true dictionary is no optimum of the loss: with the best encoder for it, the loss is
# higher than where training ends, and descending from it loses features (docs/toy.md).

# %%
text(tables.at_the_truth)

# %% [markdown]
# ### A thousand known features
#
# SynthSAEBench at a small size, beside SAELens's own training on the same samples (docs/synth.md).

# %%
text(tables.synth)
text("SAELens's learning rates:", tables.synth_lrs)

# %% [markdown]
# ## 6. Limits
#
# - The real TinyModel run has not been made here, nor has anything run on Modal. The stand-in is a
#   small model, with SAEs trained for many passes over little text; the write-up makes one pass
#   over 30 million tokens.
# - "Clean" is a cosine over 0.9, the write-up's threshold. At 0.95 the hedged features of a
#   Matryoshka SAE are not clean, until they are refitted.
# - In the toy neither SAE reaches its target L0: the sparsity weight has decayed to almost nothing
#   by the end, as in the original. The target, 1.2338, is above the tree's true L0 of 1.12.
# - The recipe that never failed did so on one tree. On three of the four harder ones it recovers
#   all features in no seed.
# - The account of why seeds fail was read off failed seeds, not shown by an intervention other than
#   the restarts themselves.
# - The concepts are word lists. Their absorption says how one latent a concept would do, not what
#   the model's own concepts are.
