# A PostgreSQL::Test::Cluster whose statements need not start a psql each: that
# takes longer than most statements do, and tests spend their time with it.
#
# safe_psql and poll_query_until, called with a database and a query and nothing
# else, use one psql for each database for as long as the server lasts.  It is made
# anew if it has ended, and after a reload, and whatever the statements have left in
# the session is discarded.

package LabNode;

use strict;
use warnings;

use parent 'PostgreSQL::Test::Cluster';

use File::Temp;
use IO::Handle;
use IPC::Open3;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $through = "-- that was all --\n";

# By node's name and database: psql's process, the ends of its pipes, and a file
# with what it complains of.
my %sessions;

sub end_session
{
	my ($key) = @_;
	my $session = delete $sessions{$key} or return;

	close $session->{in};
	close $session->{out};
	waitpid $session->{pid}, 0;
	return;
}

# The servers are stopped after this.
END
{
	my $status = $?;

	kill 'TERM', map { $_->{pid} } values %sessions;
	end_session($_) for keys %sessions;
	$? = $status;
}

sub begin_session
{
	my ($self, $key, $database) = @_;
	my $err = File::Temp->new;
	my ($in, $out);
	my $pid = open3($in, $out, '>&' . fileno $err, $self->installed_command('psql'), '-XAtq', '-v', 'ON_ERROR_STOP=1',
		'-d', $self->connstr($database));

	$sessions{$key} = { pid => $pid, in => $in, out => $out, err => $err };
	return;
}

# What the script prints; nothing if psql has ended before it was through, or
# was silent for longer than tests wait.
sub converse
{
	my ($session, $script) = @_;
	my $answer = '';
	my $readable = '';
	local $SIG{PIPE} = 'IGNORE';

	$session->{complained} = -s $session->{err}->filename;
	print { $session->{in} } "$script\n\\echo '" . ($through =~ s/\n//r) . "'\n";
	$session->{in}->flush;
	vec($readable, fileno $session->{out}, 1) = 1;
	while (substr($answer, -length $through) ne $through)
	{
		my $ready = $readable;

		if (!select($ready, undef, undef, $PostgreSQL::Test::Utils::timeout_default))
		{
			kill 'TERM', $session->{pid};
			return;
		}
		return if !sysread($session->{out}, $answer, 65536, length $answer);
	}
	substr($answer, -length $through) = '';
	return $answer;
}

sub safe_psql
{
	my ($self, $database, $query, @more) = @_;
	my $key = $self->name . " $database";
	my $answer;

	return $self->SUPER::safe_psql($database, $query, @more) if @more;

	# of a server that is no more, or has crashed
	end_session($key) if $sessions{$key} && !defined converse($sessions{$key}, 'SELECT WHERE false;');
	begin_session($self, $key, $database) if !$sessions{$key};
	$answer = converse($sessions{$key}, "$query\n;\nDISCARD ALL;");
	if (!defined $answer)
	{
		my $complaints = slurp_file($sessions{$key}{err}->filename, $sessions{$key}{complained});

		end_session($key);
		die "$complaints\nwhile running:\n$query\n";
	}
	chomp $answer;
	return $answer;
}

sub poll_query_until
{
	my ($self, $database, $query, $expected) = @_;
	my $answer;

	$expected //= 't';
	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		$answer = eval { $self->safe_psql($database, $query) } // $@;
		return 1 if $answer eq $expected;
		usleep(100_000);
	}
	diag "waited in vain for \"$expected\" from\n$query\nlast answer: $answer";
	return 0;
}

# What was read again is in force for the next statement.
sub reload
{
	my ($self) = @_;

	end_session($_) for grep { index($_, $self->name . ' ') == 0 } keys %sessions;
	return $self->SUPER::reload;
}

1;
