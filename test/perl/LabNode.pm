# A PostgreSQL::Test::Cluster whose statements need not start a psql each: that
# takes longer than most statements do, and tests spend their time with it.
#
# safe_psql and poll_query_until, called with the database postgres and a query and
# nothing else, use one psql for as long as the server lasts.  It is made anew if it
# has ended, and after a reload, and whatever the statements have left in the
# session is discarded.
#
# How fast a migration goes is not left to what else the machine has to do.

package LabNode;

use strict;
use warnings;

use parent 'PostgreSQL::Test::Cluster';

use Errno;
use File::Temp;
use IO::Handle;
use IPC::Run;
use PostgreSQL::Test::Utils ();
use Test::More ();
use Time::HiRes ();

my $through = "-- that was all --\n";

# By node's name: psql, the ends of its pipes, and a file with what it complains of.
my %sessions;

sub end_session
{
	my ($name) = @_;
	my $session = delete $sessions{$name} or return;

	close $session->{in};
	close $session->{out};
	eval { $session->{harness}->finish };
	return;
}

# The servers are stopped after this.
END
{
	my $status = $?;

	$_->{harness}->signal('TERM') for values %sessions;
	end_session($_) for keys %sessions;
	$? = $status;
}

sub init
{
	my ($self, @options) = @_;

	$self->SUPER::init(@options);
	$self->append_conf('postgresql.conf', 'risky_migrations.busy_rest = 0');
	return;
}

sub begin_session
{
	my ($self) = @_;
	my %session = (in => IO::Handle->new, out => IO::Handle->new, err => File::Temp->new);

	$session{harness} = IPC::Run::start(
		[
			$self->installed_command('psql'), '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', $self->connstr('postgres')
		],
		'<pipe', $session{in}, '>pipe', $session{out}, '2>', $session{err}->filename);
	$sessions{ $self->name } = \%session;
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
		my $count = select($ready, undef, undef, $PostgreSQL::Test::Utils::timeout_default);

		if ($count == 0)
		{
			$session->{harness}->signal('TERM');
			return;
		}
		$count = sysread($session->{out}, $answer, 65536, length $answer) if $count > 0;
		# PostgreSQL's modules have a handler for the end of any process
		next if (!defined $count || $count < 0) && $!{EINTR};
		return if !$count || $count < 0;
	}
	substr($answer, -length $through) = '';
	return $answer;
}

sub safe_psql
{
	my ($self, $database, $query, @more) = @_;
	my $name = $self->name;
	my $answer;

	return $self->SUPER::safe_psql($database, $query, @more) if @more || $database ne 'postgres';

	# of a server that is no more, or has crashed
	end_session($name) if $sessions{$name} && !defined converse($sessions{$name}, 'SELECT WHERE false;');
	begin_session($self) if !$sessions{$name};
	$answer = converse($sessions{$name}, "$query\n;\nDISCARD ALL;");
	if (!defined $answer)
	{
		my $complaints = PostgreSQL::Test::Utils::slurp_file($sessions{$name}{err}->filename, $sessions{$name}{complained});

		end_session($name);
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
		Time::HiRes::usleep(100_000);
	}
	Test::More::diag "waited in vain for \"$expected\" from\n$query\nlast answer: $answer";
	return 0;
}

# Sets something for everybody while it runs; the server knows our settings where the
# library is loaded.
sub set_for_all
{
	my ($self, @settings) = @_;

	$self->safe_psql('postgres', join ";\n", q{LOAD 'risky_migrations'}, map { "ALTER SYSTEM SET $_" } @settings);
	return $self->reload;
}

# Takes all of that back.
sub reset_all
{
	my ($self) = @_;

	$self->safe_psql('postgres', 'ALTER SYSTEM RESET ALL');
	return $self->reload;
}

# What was read again is in force for the next statement.
sub reload
{
	my ($self) = @_;

	end_session($self->name);
	return $self->SUPER::reload;
}

1;
