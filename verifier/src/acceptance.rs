//! Owns the acceptance rule: a pure comparison of a proposal with the target's own choices. Knows
//! no logits and no probabilities.
//!
//! The rule is equality under shared noise (Daliri, Musco, Suresh, arXiv 2408.07978, section 4):
//! lossless for any proposer, because every committed token is the target's own choice. It must
//! never be mixed with the p/q ratio test, which is biased under shared noise.

use slipstream_model::ids::TokenId;

/// The target's token that ends a step of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinalToken {
    /// The target's choice at the first disagreement.
    Correction(TokenId),
    /// The target's choice after all proposed tokens were accepted.
    Bonus(TokenId),
    /// The target's choice when nothing was proposed.
    Plain(TokenId),
}

impl FinalToken {
    /// The token itself.
    #[must_use]
    pub fn token(self) -> TokenId {
        match self {
            FinalToken::Correction(token) | FinalToken::Bonus(token) | FinalToken::Plain(token) => {
                token
            }
        }
    }
}

/// How a proposal fared against one target choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// The proposed token at this depth is the target's choice.
    Accepted,
    /// The target chose this token instead, or in addition; the step of the sequence ends.
    Final(FinalToken),
}

/// Judges the proposed token at `depth` (0-based) given the target's choice at its row. `depth ==
/// proposal.len()` is the row after the last proposed token.
#[must_use]
pub fn judge(proposal: &[TokenId], depth: usize, target_choice: TokenId) -> Judgement {
    match proposal.get(depth) {
        Some(&proposed) if proposed == target_choice => Judgement::Accepted,
        Some(_) => Judgement::Final(FinalToken::Correction(target_choice)),
        None if proposal.is_empty() => Judgement::Final(FinalToken::Plain(target_choice)),
        None => Judgement::Final(FinalToken::Bonus(target_choice)),
    }
}

#[cfg(test)]
mod tests {
    use super::{FinalToken, Judgement, judge};
    use slipstream_model::ids::TokenId;

    #[test]
    fn every_case_of_the_rule() {
        let proposal = [TokenId(5), TokenId(6)];
        let final_token = |token| Judgement::Final(token);
        assert_eq!(judge(&proposal, 0, TokenId(5)), Judgement::Accepted);
        let correction = FinalToken::Correction(TokenId(7));
        assert_eq!(judge(&proposal, 1, TokenId(7)), final_token(correction));
        let bonus = FinalToken::Bonus(TokenId(9));
        assert_eq!(judge(&proposal, 2, TokenId(9)), final_token(bonus));
        let plain = FinalToken::Plain(TokenId(1));
        assert_eq!(judge(&[], 0, TokenId(1)), final_token(plain));
    }
}
