//! Owns token choice a second time, the long way: sort everything, evaluate all noise, no bounds,
//! no partial selection. The tests of `choice.rs` compare bit for bit, so sums run in the order
//! that the definition gives: totals in id order, shares in order of likelihood. Knows no models.

use slipstream_model::choice::ChoiceFault;
use slipstream_model::ids::TokenId;
use slipstream_model::math;
use slipstream_model::noise::NoiseRow;
use slipstream_model::sampling::SamplingParams;

/// A row to choose from, with all that the choice depends on.
#[derive(Clone, Copy, Debug)]
pub struct NaiveRow<'a> {
    /// `[vocab]`.
    pub logits: &'a [f32],
    /// How to choose.
    pub params: &'a SamplingParams,
    /// Prompt and output.
    pub history: &'a [TokenId],
    /// Tokens of `history` that are prompt.
    pub prompt_len: usize,
}

/// Logits after penalties, bias and masks, `[vocab]`.
fn processed(row: &NaiveRow<'_>) -> Result<Vec<f64>, ChoiceFault> {
    let params = row.params;
    let output = &row.history[row.prompt_len..];
    let mut logits = Vec::new();
    for (index, &logit) in row.logits.iter().enumerate() {
        let token = TokenId(u32::try_from(index).unwrap());
        let mut logit = f64::from(logit);
        if logit.is_nan() || logit == f64::INFINITY {
            return Err(ChoiceFault::NotFinite);
        }
        if row.history.contains(&token) {
            let penalty = params.repetition_penalty;
            logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
        }
        let count = output.iter().filter(|t| **t == token).count();
        if count > 0 {
            logit -= params.frequency_penalty * count as f64;
            logit -= params.presence_penalty;
        }
        for (_, bias) in params.logit_bias.iter().filter(|(biased, _)| *biased == token) {
            logit += bias;
        }
        if output.len() < params.min_tokens && params.end_ids.contains(&token) {
            logit = f64::NEG_INFINITY;
        }
        logits.push(logit);
    }
    Ok(logits)
}

/// Scores (logits divided by the temperature) of the tokens that survive, in id order.
///
/// # Errors
/// [`ChoiceFault`] as the product gives it.
pub fn survivors(row: &NaiveRow<'_>) -> Result<Vec<(TokenId, f64)>, ChoiceFault> {
    let params = row.params;
    let mut kept: Vec<(TokenId, f64)> = Vec::new();
    for (index, logit) in processed(row)?.into_iter().enumerate() {
        let score = logit / params.temperature;
        if score.is_nan() || score == f64::INFINITY {
            return Err(ChoiceFault::NotFinite);
        }
        if score > f64::NEG_INFINITY {
            kept.push((TokenId(u32::try_from(index).unwrap()), score));
        }
    }
    if kept.is_empty() {
        return Err(ChoiceFault::AllMasked);
    }
    let max = kept.iter().map(|(_, score)| *score).fold(f64::NEG_INFINITY, f64::max);
    let by_likelihood = |list: &mut Vec<(TokenId, f64)>| {
        list.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    };
    if params.top_k > 0 {
        by_likelihood(&mut kept);
        kept.truncate(params.top_k as usize);
        kept.sort_by_key(|(token, _)| *token);
    }
    if params.top_p < 1.0 {
        let total: f64 = kept.iter().map(|(_, score)| math::exp(score - max)).sum();
        by_likelihood(&mut kept);
        let mut share = 0.0;
        let mut num_kept = 0;
        for (_, score) in &kept {
            num_kept += 1;
            share += math::exp(score - max);
            if share >= params.top_p * total {
                break;
            }
        }
        kept.truncate(num_kept);
    }
    if params.min_p > 0.0 {
        kept.retain(|(_, score)| *score >= max + math::ln(params.min_p));
    }
    kept.sort_by_key(|(token, _)| *token);
    Ok(kept)
}

/// The law of the choice over seeds, `[vocab]`, at a temperature above 0.
///
/// # Errors
/// [`ChoiceFault`] as the product gives it.
pub fn law(row: &NaiveRow<'_>) -> Result<Vec<f64>, ChoiceFault> {
    let kept = survivors(row)?;
    let max = kept.iter().map(|(_, score)| *score).fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = kept.iter().map(|(_, score)| (score - max).exp()).sum();
    let mut probabilities = vec![0.0; row.logits.len()];
    for (token, score) in kept {
        probabilities[token.index()] = (score - max).exp() / total;
    }
    Ok(probabilities)
}

/// The token, by looking at everything.
///
/// # Errors
/// [`ChoiceFault`] as the product gives it.
pub fn choose(row: &NaiveRow<'_>) -> Result<TokenId, ChoiceFault> {
    choose_sharpened(row, 1.0)
}

/// As [`choose`], as a draft of this sharpening does.
///
/// # Errors
/// [`ChoiceFault`] as the product gives it.
pub fn choose_sharpened(row: &NaiveRow<'_>, sharpening: f64) -> Result<TokenId, ChoiceFault> {
    let params = row.params;
    let scores: Vec<(TokenId, f64)> = if params.temperature == 0.0 {
        let logits = processed(row)?.into_iter().enumerate();
        logits.map(|(index, logit)| (TokenId(u32::try_from(index).unwrap()), logit)).collect()
    } else {
        let noise = NoiseRow::new(params.seed, params.sample_index, row.history.len());
        let noisy =
            |(token, score): (TokenId, f64)| (token, sharpening * score + noise.gumbel(token));
        survivors(row)?.into_iter().map(noisy).collect()
    };
    let mut best: Option<(TokenId, f64)> = None;
    for (token, score) in scores {
        // Strictly greater: the first of equals stays, and ids ascend. With noise even a score that
        // sharpening made infinite may win; without, a masked token may not.
        let is_first = best.is_none() && params.temperature > 0.0;
        if is_first || score > best.map_or(f64::NEG_INFINITY, |(_, score)| score) {
            best = Some((token, score));
        }
    }
    best.map(|(token, _)| token).ok_or(ChoiceFault::AllMasked)
}
