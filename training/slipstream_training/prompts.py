"""Prompts for the completions that a model card shows: fresh ones, in no crate of the corpus."""

COMPLETIONS = (
    "/// Returns the larger of two temperatures in degrees Celsius.\npub fn warmer(left: f64, right: f64) -> f64 {\n",
    "/// Counts the vowels in `text`, upper case included.\nfn count_vowels(text: &str) -> usize {\n"
    "    text.chars()",
    "impl Iterator for Countdown {\n    type Item = u32;\n\n    fn next(&mut self) -> Option<Self::Item> {\n",
    "impl fmt::Display for Playlist {\n    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {\n",
    "#[cfg(test)]\nmod tests {\n    use super::*;\n\n    #[test]\n    fn an_empty_basket_costs_nothing() {\n",
    "#[test]\nfn parses_a_recipe() {\n    let recipe = Recipe::parse(\"2 eggs, 100 g flour\").unwrap();\n"
    "    assert_eq!(",
    "/// A train that leaves a station on time.\n///\n/// # Examples\n///\n/// ```\n",
    "//! Reads sensor values from a weather station.\n//!\n//! The main type is [`Station`], which",
    "#[derive(Debug, Clone, PartialEq)]\npub enum ParcelError {\n    /// The address is missing.\n    NoAddress,\n",
    "pub struct Garden {\n    plants: Vec<Plant>,\n}\n\nimpl Garden {\n    /// Creates a garden without any plants.\n"
    "    pub fn new() -> Self {\n",
)
