//! Owns the text that a conversation becomes for a model without a chat template, and what of a
//! conversation is kept. Knows no server.

/// What begins a turn of the person.
const USER: &str = "User:";
/// What begins a turn of the model.
const ASSISTANT: &str = "Assistant:";

/// What ends an answer: the model writing the person's next turn.
pub(super) const STOP: &str = "\nUser:";

/// A question and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    /// What the person wrote.
    pub(super) user: String,
    /// What the model answered.
    pub(super) assistant: String,
}

/// A conversation so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Conversation {
    /// What stands before all turns.
    pub(super) system: Option<String>,
    /// The turns that are kept, oldest first.
    pub(super) turns: Vec<Turn>,
}

impl Conversation {
    /// The prompt for an answer to this.
    pub(super) fn prompt(&self, user: &str) -> String {
        let mut prompt = String::new();
        if let Some(system) = &self.system {
            prompt.push_str(&format!("{}\n\n", system.trim()));
        }
        for turn in &self.turns {
            let (user, assistant) = (turn.user.trim(), turn.assistant.trim());
            prompt.push_str(&format!("{USER} {user}\n{ASSISTANT} {assistant}\n"));
        }
        prompt.push_str(&format!("{USER} {}\n{ASSISTANT}", user.trim()));
        prompt
    }

    /// Forgets the oldest turn. False when there is none.
    pub(super) fn drop_oldest(&mut self) -> bool {
        let has_turns = !self.turns.is_empty();
        if has_turns {
            self.turns.remove(0);
        }
        has_turns
    }
}

#[cfg(test)]
mod tests {
    use super::{Conversation, STOP, Turn};

    fn turn(user: &str, assistant: &str) -> Turn {
        Turn { user: user.to_owned(), assistant: assistant.to_owned() }
    }

    #[test]
    fn turns_are_written_one_behind_the_other() {
        let mut conversation = Conversation::default();
        assert_eq!(conversation.prompt("Hi"), "User: Hi\nAssistant:");
        conversation.system = Some("Be brief.\n".to_owned());
        conversation.turns = vec![turn("Hi", " Hello.\n"), turn("a\nb ", "c")];
        let expected = "Be brief.\n\nUser: Hi\nAssistant: Hello.\nUser: a\nb\nAssistant: c\n\
                        User: and?\nAssistant:";
        assert_eq!(conversation.prompt(" and?"), expected);
        assert!(expected.contains(STOP));
    }

    #[test]
    fn the_oldest_turn_goes_first() {
        let turns = vec![turn("1", "a"), turn("2", "b")];
        let mut conversation = Conversation { system: Some("s".to_owned()), turns };
        assert!(conversation.drop_oldest());
        assert_eq!(conversation.prompt("3"), "s\n\nUser: 2\nAssistant: b\nUser: 3\nAssistant:");
        assert!(conversation.drop_oldest() && !conversation.drop_oldest());
    }
}
